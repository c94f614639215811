"""How many rows a chunk of the loss takes, what is alive meanwhile, and the way of a device with memory of its own."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from offload.model import causal_lm_loss, fp32_sums
from offload.model.causal_lm_loss import LazyLogits, _as_scalar, chunk_loss, chunk_rows
from offload.planner.memory import _own_device_root_nbytes
from offload.profiling.working_set import LiveBytes
from offload.profiling.workload import profile_model
from tests.conftest import llama
from tests.unit.test_causal_lm_loss import (
    VOCAB,
    LargestVocabularyTensor,
    assert_close,
    make_batch,
    make_model,
    run,
)

pytest.importorskip("transformers")


class LiveLogits(TorchDispatchMode):
    """Most bytes of logits and their like (tokens, vocabulary) that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most_nbytes = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCAB and out._base is None:
            storage = out.untyped_storage()
            if out.shape != (32, VOCAB):  # as above
                self._alive[storage.data_ptr()] = (weakref.ref(out), storage.nbytes())
        self._alive = {key: held for key, held in self._alive.items() if held[0]() is not None}
        self.most_nbytes = max(self.most_nbytes, sum(nbytes for _, nbytes in self._alive.values()))
        return out


class Operations(TorchDispatchMode):
    """The names of what has been done."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def own_memory(monkeypatch):
    """The CPU is taken for a device with memory of its own."""
    monkeypatch.setattr(causal_lm_loss, "_has_own_memory", lambda device: True)


H100_FLOPS_PER_BYTE = 713e12 / 3.35e12


@pytest.mark.parametrize(("vocabulary", "width"), [(32_000, 4096), (50_257, 2048), (128_256, 4096)])
def test_on_a_device_of_its_own_products_of_a_chunk_hide_the_traffic_of_the_gradients_sum(
    vocabulary: int, width: int
) -> None:
    rows = chunk_rows(vocabulary, width, own_memory=True)
    product_flops = 2 * rows * vocabulary * width
    traffic_nbytes = 2 * 4 * vocabulary * width
    assert product_flops >= H100_FLOPS_PER_BYTE * traffic_nbytes


@given(st.integers(1, 600_000), st.integers(0, 20_000))
def test_logits_of_a_chunk_are_bounded_and_at_most_64_mib_or_half_of_the_gradients_sum(
    vocabulary: int, width: int
) -> None:
    logits_nbytes = 4 * vocabulary * chunk_rows(vocabulary, width, own_memory=True)
    sum_nbytes = 4 * vocabulary * width
    assert logits_nbytes <= 512 * 2**20
    assert 2 * logits_nbytes <= max(2 * 64 * 2**20, sum_nbytes)
    on_a_processor = 4 * vocabulary * chunk_rows(vocabulary, width, own_memory=False)
    assert 64 * 2**20 - 4 * vocabulary < on_a_processor <= 64 * 2**20
    assert logits_nbytes >= on_a_processor


@pytest.mark.parametrize(("trained", "rows"), [(True, 40), (False, 10)])
def test_only_a_head_that_gets_a_gradient_takes_more_rows(
    trained: bool, rows: int, own_memory, monkeypatch
) -> None:
    monkeypatch.setattr(causal_lm_loss, "chunk_rows", lambda v, w, own_memory: 40 if own_memory and w else 10)
    model, batch = make_model("llama"), make_batch()
    model.lm_head.weight.requires_grad_(trained)
    chunk_loss(model)
    with LargestVocabularyTensor() as chunked:
        run(model, **batch)
    assert chunked.rows == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_two_fp32_buffers_of_logits_exist_at_once_and_none_of_the_chunk_before(
    dtype: torch.dtype, own: bool, monkeypatch
) -> None:
    monkeypatch.setattr(causal_lm_loss, "_has_own_memory", lambda device: own)
    model, batch = make_model("llama", dtype), make_batch()
    chunk_loss(model, chunk_tokens=10)
    with LiveLogits() as live:
        run(model, **batch)
    assert live.most_nbytes == 2 * 4 * 10 * VOCAB


def error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of the head's gradient."""
    exact = wanted["lm_head.weight"].double()
    return float((got["lm_head.weight"].double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_on_a_device_of_its_own_are_as_near_to_fp32_as_the_stock_ones(
    wide: bool, own_memory, monkeypatch
) -> None:
    def adds(device, dtype):
        return wide

    def addmm(total, left, right, out_dtype, out):
        assert left.dtype == right.dtype == torch.bfloat16
        return out.copy_(total + left.float() @ right.float())

    batch = make_batch()
    _, exact = run(make_model("llama").to(torch.bfloat16).float(), **batch)
    model = make_model("llama", torch.bfloat16)
    loss, stock = run(model, **batch)
    monkeypatch.setattr(fp32_sums, "_adds_in_fp32", adds)
    monkeypatch.setattr(torch, "addmm", addmm)
    chunk_loss(model, chunk_tokens=10)
    chunked_loss, chunked = run(model, **batch)
    assert abs(chunked_loss - loss) <= 1e-6 * loss
    assert_close(chunked, stock, 2**-7)

    if wide:
        assert error(chunked, exact) <= error(stock, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_for_a_device_of_its_own_counts_what_the_loss_in_chunks_holds(
    dtype: torch.dtype, own_memory, monkeypatch
) -> None:
    monkeypatch.setattr(causal_lm_loss, "CHUNK_LOGITS_NBYTES", 1 << 16)
    vocabulary, width, samples, tokens = 3000, 64, 2, 64
    with torch.device("meta"):
        planned_for = profile_model(llama(layers=2, hidden=width, vocab=vocabulary).to(dtype), tokens)
    planned_nbytes = _own_device_root_nbytes(planned_for, samples)
    model = llama(layers=2, hidden=width, vocab=vocabulary).to(dtype)
    loss = chunk_loss(model)._loss
    hidden = torch.randn(samples, tokens, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (samples, tokens))
    weight = model.lm_head.weight
    with LiveBytes([hidden, labels, weight]) as alive:
        lazy = LazyLogits.make(hidden, model.lm_head, model.lm_head.forward, dtype)
        loss(lazy, labels, vocabulary).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    most_nbytes = max(alive.history)
    beside_nbytes = (
        4 * samples * tokens * (2 * width + 32)
    )  # gradients of hidden states, some numbers a token
    assert 0.75 * planned_nbytes < most_nbytes <= planned_nbytes + beside_nbytes


def test_a_step_asks_for_no_value_that_a_device_would_have_to_be_waited_for(own_memory) -> None:
    model, batch = make_model("llama"), make_batch()
    chunk_loss(model, chunk_tokens=10)
    run(model, **batch)
    output = model(**batch, num_items_in_batch=77)
    with Operations() as forward:
        loss = model.loss_function(output.logits, batch["labels"], VOCAB, num_items_in_batch=77)
    with Operations() as backward:
        loss.backward()
    asked = {
        "_local_scalar_dense",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "unique",
        "_to_cpu",
    }
    assert {"log_softmax", "_log_softmax"} & forward.names
    assert not (forward.names | backward.names) & asked
    for number in (77, torch.tensor(77)):  # a number in host memory is written by a kernel, not copied
        with Operations() as sent:
            assert _as_scalar(number, torch.device("meta")).dtype == torch.float32
        assert "_to_copy" not in sent.names

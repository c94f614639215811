"""On a device with memory of its own the root goes through in parts that overlap; every wait of theirs is needed."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import offload
from offload.model.flat import lay_out
from offload.runtime import gradients
from offload.runtime.device_residency import CopiedResidency
from offload.runtime.gradients import Gradients
from offload.runtime.update_jobs import parts_of
from offload.stores.block_store import BlockRecord
from offload.transfer.copies import Copies
from offload.transfer.io_engine import Hyper, Ticket
from offload.types import ROOT_PARTS
from offload.update_rules import ADAMW
from tests.cuda import deterministic_cuda, sleepy_copies
from tests.integration.stack import differs, parameters_of

VOCAB, WIDTH, CHUNK = 4096, 64, 4096
SLOW_BUS = 5e6
"""The root's gradients take 210 ms to leave, its parameters 105 to come back."""


class Tied(nn.Module):
    """An embedding that is the head too, a scale that is trained beside it, and blocks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))

    def forward(self, tokens):
        x = self.embedding(tokens) * self.scale
        for layer in self.layers:
            x = layer(x)
        return (x @ self.embedding.weight.T).float().square().mean()


def wrapped(dtype=torch.bfloat16, optimizer=torch.optim.AdamW, **settings):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    settings = {
        "device": "emulated", "storage": [], "device_memory": "20MB", "host_memory": "40MB", "plan": "none", **settings
    }  # fmt: skip
    made = optimizer(model.parameters(), lr=1e-2)
    return offload.wrap(model, made, step_aside="never", chunk_elements=CHUNK, **settings)


def step(model, optimizer, number):
    tokens = torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(number))
    model(tokens.to(model.offload.device)).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(n_steps=4, **settings):
    model, optimizer = wrapped(**settings)
    try:
        for number in range(n_steps):
            step(model, optimizer, number)
        return parameters_of(model)
    finally:
        model.offload.close()


@pytest.fixture(scope="module")
def expected():
    return trained(device="cpu")


def turn(**settings):
    """Spans of the root's gradients, update and parameters at the end of a step and in the forward after it."""
    model, optimizer = wrapped(**settings)
    step(model, optimizer, 0)
    with model.offload.record() as spans:
        step(model, optimizer, 1)
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64))
    model.offload.close()
    out, made, back = (
        [s for s in spans if s.name == f"{kind} root"] for kind in ("grad_out", "update", "load")
    )
    return out, made, [s for s in back if s.start_s > out[0].start_s]  # not those of the first forward


def test_gradients_update_and_parameters_of_the_root_overlap():
    out, made, back = turn(bus_bytes_per_s=SLOW_BUS)
    assert all(ROOT_PARTS // 2 < len(spans) <= ROOT_PARTS for spans in (out, back))
    assert min(s.start_s for s in made) < max(s.end_s for s in out)
    # The parameters are asked for by the forward after the step, and the last part of them by the last update.
    assert min(s.start_s for s in back) < max(s.end_s for s in made)
    assert max(s.end_s for s in back) > max(s.end_s for s in made)


class Slow(offload.ElementwiseOptimizer):
    """Takes 4 ms for each piece."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    def update(self, param, grad, state, step, group):
        time.sleep(0.004)
        param.add_(grad, alpha=-group["lr"])


@pytest.mark.parametrize("update", ["backward", "deferred"])
def test_the_root_comes_back_while_blocks_that_are_wanted_later_wait_for_their_updates(update):
    _, made, back = turn(optimizer=Slow, update=update)
    assert len(back) > ROOT_PARTS // 2
    assert back[0].start_s < made[len(made) // 2].start_s


def test_every_byte_of_the_root_crosses_the_bus_once_each_way():
    model, optimizer = wrapped()
    for number in range(2):
        step(model, optimizer, number)
    copies, root = model.offload.parts.resources.copies, model.offload.root
    before = copies.h2d_bytes, copies.d2h_bytes
    blocks = sum(block.layout.slot_nbytes for block in model.offload.blocks)
    step(model, optimizer, 2)
    model.offload.close()
    assert root.layout.slot_nbytes <= copies.h2d_bytes - before[0] <= root.layout.slot_nbytes + 2 * blocks
    grads = 4 * (VOCAB * WIDTH + WIDTH)
    assert grads <= copies.d2h_bytes - before[1] <= grads + 4 * blocks


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"update": "deferred"}, marks=pytest.mark.slow),
        pytest.param({"max_grad_norm": 0.01}, marks=pytest.mark.slow),
        pytest.param({"micro_batches": 2}, marks=pytest.mark.slow),
        {"durable": True},
        pytest.param({"dtype": torch.float32}, marks=pytest.mark.slow),
        pytest.param({"optimizer": torch.optim.Adafactor}, marks=pytest.mark.slow),
        pytest.param({"optimizer": torch.optim.SGD}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_root_in_parts_has_the_bits_of_the_root_as_a_whole(tmp_path, monkeypatch, settings):
    settings = dict(settings)
    if settings.pop("durable", False):
        settings |= {"storage": [str(tmp_path)], "durability": "step"}
    in_some = trained(bus_bytes_per_s=SLOW_BUS, **settings)
    monkeypatch.setattr(gradients, "ROOT_PARTS", 1)
    assert not differs(in_some, trained(**settings))
    if "durability" not in settings:
        assert not differs(in_some, trained(**{**settings, "device": "cpu"}))


# ---- every wait is needed ------------------------------------------------------------------------------------


def opened():
    gate = Ticket()
    gate.complete()
    return gate


def update_a_part_before_its_gradients_have_arrived(monkeypatch):
    hand_over = Gradients.hand_over

    def hurried(self, block, segments_of):
        parts = hand_over(self, block, segments_of)
        for part in parts if block.is_root else ():
            part.gate = opened()
        return parts

    monkeypatch.setattr(Gradients, "hand_over", hurried)


def update_every_part_when_the_first_has_arrived(monkeypatch):
    hand_over = Gradients.hand_over

    def hurried(self, block, segments_of):
        parts = hand_over(self, block, segments_of)
        for part in parts if block.is_root else ():
            part.gate = parts[0].gate
        return parts

    monkeypatch.setattr(Gradients, "hand_over", hurried)


def load_a_part_before_it_is_updated(monkeypatch):
    in_parts = Copies.h2d_in_parts
    monkeypatch.setattr(
        Copies,
        "h2d_in_parts",
        lambda self, parts, *how: in_parts(self, [(begin, end, opened()) for begin, end, _ in parts], *how),
    )


def load_all_when_the_first_part_is_updated(monkeypatch):
    in_parts = Copies.h2d_in_parts
    monkeypatch.setattr(
        Copies,
        "h2d_in_parts",
        lambda self, parts, *how: in_parts(
            self, [(begin, end, parts[0][2]) for begin, end, _ in parts], *how
        ),
    )


def compute_before_the_parts_have_arrived(monkeypatch):
    begin_use = CopiedResidency.begin_use
    monkeypatch.setattr(
        CopiedResidency, "begin_use", lambda self, block: None if block.is_root else begin_use(self, block)
    )


def test_with_every_wait_in_place_a_slow_bus_changes_no_number(expected):
    assert not differs(trained(bus_bytes_per_s=SLOW_BUS), expected)


LATE_IN_COPIES = [
    update_a_part_before_its_gradients_have_arrived,
    update_every_part_when_the_first_has_arrived,
    load_all_when_the_first_part_is_updated,
    compute_before_the_parts_have_arrived,
]


@pytest.mark.parametrize(
    "without", [*LATE_IN_COPIES, load_a_part_before_it_is_updated], ids=lambda f: f.__name__
)
def test_without_one_wait_the_numbers_change(expected, monkeypatch, without):
    without(monkeypatch)
    assert differs(trained(bus_bytes_per_s=SLOW_BUS), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "without", [None, *LATE_IN_COPIES], ids=lambda f: "nothing" if f is None else f.__name__
)
def test_with_late_copies_on_a_gpu_the_numbers_change_exactly_where_a_wait_is_missing(monkeypatch, without):
    with deterministic_cuda(monkeypatch):
        expected = trained(device="cuda")
        sleepy_copies(monkeypatch)
        if without is not None:
            without(monkeypatch)
        got = trained(device="cuda")
    assert differs(got, expected) == (without is not None)


# ---- what is in a part ---------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 30_000), min_size=1, max_size=6),
    n_frozen=st.integers(0, 2),
    with_gradient=st.sets(st.integers(0, 5)),
    chunk_elements=st.sampled_from([2048, 4096, 8192]),
)
def test_parts_are_whole_chunks_and_cover_every_trainable_element_once(
    sizes, n_frozen, with_gradient, chunk_elements
):
    parameters = [(f"p{i}", nn.Parameter(torch.zeros(n))) for i, n in enumerate(sizes)]
    for _, parameter in parameters[:n_frozen]:
        parameter.requires_grad_(False)
    layout = lay_out("root", parameters, None, ADAMW, chunk_elements)
    root = BlockRecord(0, layout, True, -1, {})
    segments_of = [
        [
            (s.start, s.numel, Hyper(1e-3))
            for s in b.segments
            if int(s.name[1:]) in with_gradient and b.trainable
        ]
        for b in layout.buffers
    ]
    parts = parts_of(root, segments_of, ROOT_PARTS)
    for position, buffer in enumerate(layout.buffers):
        mine = [part for part in parts if part.position == position]
        covered = [(part.start, part.stop) for part in mine]
        if not buffer.trainable:
            assert covered == []
            continue
        assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
        assert covered[-1][1] == buffer.n_elements
        assert len(mine) <= ROOT_PARTS + 1
        assert all(start % chunk_elements == 0 for start, _ in covered)
        updated = sum(n for part in mine for _, n, _ in part.segments)
        assert updated == sum(n for _, n, _ in segments_of[position])
        assert all(p.start <= s and s + n <= p.stop for p in mine for s, n, _ in p.segments)

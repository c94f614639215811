"""Optimizers whose update Python makes: of one's own, chunk by chunk, and Adafactor; as torch makes them in memory."""

from __future__ import annotations

import pytest
import torch
from torch.optim.rmsprop import rmsprop

import offload
from offload.errors import ConfigError
from tests.fault.training import STREAMING, Model, wrap_small
from tests.integration.test_optimizer_rules import assert_same, parameters_of, train

LR = 1e-3


class RMSprop(offload.ElementwiseOptimizer):
    """torch's own functional RMSprop over staged chunks."""

    state_names = ("square_avg", "momentum_buffer")

    def __init__(self, params, lr=LR, alpha=0.99, eps=1e-8, momentum=0.9):
        super().__init__(params, dict(lr=lr, alpha=alpha, eps=eps, momentum=momentum))

    def update(self, param, grad, state, step, group):
        rmsprop(
            [param], [grad], [state["square_avg"]], [], [state["momentum_buffer"]], [torch.tensor(float(step - 1))],
            lr=group["lr"], alpha=group["alpha"], eps=group["eps"], momentum=group["momentum"], weight_decay=0.0,
            centered=False,
        )  # fmt: skip


class Adagrad(offload.ElementwiseOptimizer):
    """Its sum begins at 0.1, not at zero."""

    state_names = ("sum",)

    def __init__(self, params, lr=LR):
        super().__init__(params, dict(lr=lr))

    def init_state(self, param, state, group):
        state["sum"].fill_(0.1)

    def update(self, param, grad, state, step, group):
        state["sum"].addcmul_(grad, grad)
        param.addcdiv_(grad, state["sum"].sqrt().add_(1e-10), value=-group["lr"])


class Broken(offload.ElementwiseOptimizer):
    def __init__(self, params):
        super().__init__(params, dict(lr=LR))

    def update(self, param, grad, state, step, group):
        if step == 2:
            raise ArithmeticError("no such number")


PAIRS = {
    "rmsprop": (RMSprop, lambda p: torch.optim.RMSprop(p, lr=LR, momentum=0.9)),
    "adagrad": (Adagrad, lambda p: torch.optim.Adagrad(p, lr=LR, initial_accumulator_value=0.1)),
    "adafactor": (
        lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    ),
}
BOUND = {"rmsprop": 2e-6, "adagrad": 1e-6, "adafactor": 2e-6}
"""Some roundings of parameters below one; a first step of RMSprop moves by ten times lr."""


def make(kind, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = Model(3).to(dtype)
    optimizer = PAIRS[kind][0](model.parameters()) if isinstance(kind, str) else kind(model.parameters())
    settings = {"chunk_elements": 2048, "chunk_buffers": 2, **settings}
    return wrap_small(model, optimizer, **settings)


def result(kind, dtype=torch.float32, n_steps=6, accumulate=1, **settings):
    model, optimizer = make(kind, dtype, **settings)
    train(model, optimizer, n_steps, accumulate)
    parameters = parameters_of(model)
    model.offload.close()
    return parameters


def in_torch(make_optimizer, n_steps):
    torch.manual_seed(0)
    model = Model(3)
    optimizer = make_optimizer(model.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", PAIRS)
def test_storage_gives_what_torch_gives_in_memory(tmp_path, kind):
    expected = in_torch(PAIRS[kind][1], 10)
    got = result(kind, n_steps=10, storage=[str(tmp_path)], update="backward")
    moved = in_torch(PAIRS[kind][1], 1)
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= BOUND[kind], name
        assert (moved[name] - tensor).abs().max() > 20 * BOUND[kind], name


@pytest.mark.parametrize("kind", ["rmsprop", "adagrad"])
def test_the_same_class_trains_unwrapped(kind):
    expected = in_torch(PAIRS[kind][1], 5)
    for name, tensor in in_torch(PAIRS[kind][0], 5).items():
        assert (tensor - expected[name]).abs().max() <= BOUND[kind]


PATHS = {
    "bf16": {"dtype": torch.bfloat16},
    "larger chunks": {"chunk_elements": 6144},
    "deferred": {"update": "deferred"},
    "three threads": {"update_threads": 3},
    "in host memory": {"host_memory": "100MB", "device_memory": "100MB", **STREAMING},
    "accumulation": {"accumulate": 3},
    "clipping": {"max_grad_norm": 0.05},
    "durable steps": {"durability": "step"},
    "emulated device": {"device": "emulated"},
}
IN_BOTH = ("dtype", "accumulate", "max_grad_norm")


FAST = [("rmsprop", path) for path in PATHS]
FAST += [("adafactor", path) for path in ("bf16", "clipping", "durable steps")]
SLOW = [(kind, path) for kind in ("adagrad", "adafactor") for path in PATHS if (kind, path) not in FAST]


@pytest.mark.parametrize(
    ("kind", "path"), FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_no_path_changes_a_bit(tmp_path, path, kind):
    """Adafactor's sums over a parameter are made of one sum a chunk: they may differ where chunks do."""
    settings = PATHS[path]
    shared = {k: v for k, v in settings.items() if k in IN_BOTH}
    expected = result(kind, **shared)
    got = result(kind, storage=[str(tmp_path)], **settings)
    if kind == "adafactor":
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-2 if path == "bf16" else 1e-6, atol=1e-6)
        again = result(kind, storage=[str(tmp_path / "again")], **settings)
        assert_same(again, got)
    else:
        assert_same(got, expected)


@pytest.mark.parametrize("kind", ["rmsprop", "adafactor"])
def test_a_saved_run_goes_on_with_the_bits_it_would_have_had(tmp_path, kind):
    whole = result(kind, storage=[str(tmp_path / "a")], update="backward")
    model, optimizer = make(kind, storage=[str(tmp_path / "b")], update="backward")
    train(model, optimizer, 3)
    offload.save(model, str(tmp_path / "saved"))
    model.offload.close()
    model, optimizer = make(kind, storage=[str(tmp_path / "c")], update="backward")
    assert offload.resume(model, str(tmp_path / "saved")).step == 3
    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        x = torch.randn(4, 8, generator=generator)
        if number < 3:
            continue
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(parameters_of(model), whole)
    model.offload.close()


def test_adafactor_keeps_nothing_on_storage_but_the_low_half_of_masters(tmp_path):
    model, optimizer = make("adafactor", torch.bfloat16, storage=[str(tmp_path)], update="backward")
    layouts = [block.layout for block in [model.offload.root, *model.offload.blocks]]
    assert sum(x.state_nbytes for x in layouts) == 2 * sum(x.trainable_elements for x in layouts)
    train(model, optimizer, 1)
    model.offload.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_reads_gradients_that_wait_on_storage(tmp_path, dtype):
    """One transfer at a time, so that a sum that waited for its own chunk would never end; the sums' slabs are smaller
    than a parameter, and parameters begin in the middle of a page."""
    settings = {"update": "deferred", "io_queue_depth": 1}
    expected = result("adafactor", dtype)
    model, optimizer = make("adafactor", dtype, storage=[str(tmp_path)], **settings)
    assert all(block.grad_offset >= 0 for block in model.offload.blocks)
    before = model.offload.counters()["read_bytes"]
    train(model, optimizer, 6)
    got = parameters_of(model)
    n_waiting = sum(block.layout.trainable_elements for block in model.offload.blocks)
    assert (
        model.offload.counters()["read_bytes"] - before > 6 * 3 * 4 * n_waiting
    )  # twice for sums, once to update
    for name, tensor in expected.items():
        bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(got[name], tensor, rtol=bound, atol=1e-6)
    model.offload.close()


def test_an_update_that_raises_fails_the_step_with_its_words(tmp_path):
    model, optimizer = make(Broken, storage=[str(tmp_path)], update="backward")
    train(model, optimizer, 1)
    with pytest.raises(OSError, match="ArithmeticError: no such number"):
        train(model, optimizer, 2)
    with pytest.raises(OSError, match="no such number"):
        model.offload.close()


def test_what_cannot_be_done_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="optimizer_state='8bit': RMSprop keeps its state in fp32"):
        make("rmsprop", optimizer_state="8bit")
    with pytest.raises(NotImplementedError, match="has no update"):
        in_torch(lambda p: offload.ElementwiseOptimizer(p, {}), 1)

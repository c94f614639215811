"""The global norm that a step is clipped by, or judged by where it can be taken back. The oracle is torch's."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import offload
from offload.runtime import gradient_norms
from tests.fault.training import STREAMING, WIDTH, Model, smallest_budgets


class Gained(nn.Module):
    """A layer with a gain in bf16, in a model of fp32."""

    def __init__(self, layer):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * self.gain.float()


CUTS = {
    "aside": {"step_aside": "always"},
    "streamed": {"step_aside": "never"},
    "updated in backward": {"step_aside": "never", "durability": "step", "update": "backward"},
    "a device of its own": {"step_aside": "never", "device": "emulated"},
}


@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "two dtypes"])
def test_a_norm_that_is_clipped_has_the_same_bits_however_the_model_is_cut(tmp_path, mixed):
    """Without bf16, whose norms torch rounds to bf16, they are torch's."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def made():
        torch.manual_seed(0)
        model = Model(6)
        if mixed:
            model.layers = nn.ModuleList(map(Gained, model.layers))
        return model

    norms = {}
    for name, settings in CUTS.items():
        model = made()
        model, optimizer = offload.wrap(
            model, torch.optim.AdamW(model.parameters(), lr=1e-3), max_grad_norm=1.0, storage=[str(tmp_path / name)],
            device_memory="100MB", host_memory="100MB", chunk_elements=2048, **settings,
        )  # fmt: skip
        model(x).square().mean().backward()
        optimizer.step()
        norms[name] = float(optimizer.grad_norm)
        model.offload.close(remove=True)
    if not mixed:
        model = made()
        model(x).square().mean().backward()
        norms["torch"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    assert len(set(norms.values())) == 1, norms


@pytest.mark.parametrize("settings", [{}, {"device": "emulated"}], ids=["cpu", "emulated"])
def test_a_gradient_longer_than_one_dot_takes_has_the_same_norm(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(gradient_norms, "DOT_ELEMENTS", 100)
    dot, lengths = torch.dot, []

    def counted(a, b):
        lengths.append(a.numel())
        return dot(a, b)

    monkeypatch.setattr(torch, "dot", counted)
    torch.manual_seed(0)
    plain = Model(3).float()
    streamed = copy.deepcopy(plain)
    model, optimizer = offload.wrap(
        streamed,
        torch.optim.AdamW(streamed.parameters(), lr=1e-3),
        storage=[str(tmp_path)],
        device_memory="100MB",
        host_memory="100MB",
        durability="step",
        step_aside="never",
        chunk_elements=2048,
        **settings,
    )
    x = torch.randn(4, 8)
    for m in (plain, model):
        m(x).square().mean().backward()
    optimizer.step()
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    torch.testing.assert_close(optimizer.grad_norm.cpu(), expected, rtol=1e-6, atol=0)
    assert max(lengths) == 100 < max(p.numel() for p in plain.parameters())
    model.offload.close(remove=True)


class LeavingOut(Model):
    """Blocks in `left_out` are passed by."""

    left_out: tuple[int, ...] = ()

    def forward(self, x):
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            if number not in self.left_out:
                x = layer(x)
        return self.head(x)


ACCUMULATIONS = {
    "a block that the last backward leaves out": [((), True), ((1,), False)],
    "no last backward": [((), True), ((2,), True)],
    "a block that only the last backward has": [((0,), True), ((), False)],
}


@pytest.mark.parametrize("backwards", ACCUMULATIONS.values(), ids=ACCUMULATIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 0.05, "device_memory": "100MB", "host_memory": "100MB"},
        {"max_grad_norm": 0.05, "device": "emulated"},
        {"durability": "step"},
    ],
    ids=str,
)
def test_gradients_accumulated_by_any_of_a_steps_backwards_are_in_its_norm(tmp_path, backwards, settings):
    torch.manual_seed(0)
    plain = LeavingOut(3)
    streamed = copy.deepcopy(plain)
    made = torch.optim.AdamW(streamed.parameters(), lr=1e-3)
    settings = {
        "storage": [str(tmp_path)],
        "chunk_elements": 2048,
        "prefetch_blocks": 1,
        **STREAMING,
        **settings,
    }
    if "device_memory" not in settings:
        settings |= smallest_budgets(streamed, made, settings)
        settings["device_memory"] += 10_000  # for inputs that wait
    model, optimizer = offload.wrap(streamed, made, **settings)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for step in range(3):
        for left_out, waits in backwards:
            x = torch.randn(4, 8) * (1 + step)
            for m in (plain, model):
                m.left_out = left_out
                with model.offload.no_sync() if waits and m is model else contextlib.nullcontext():
                    m(x).square().mean().backward()
        limit = settings.get("max_grad_norm", float("inf"))
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), limit)
        for one in (theirs, optimizer):
            one.step()
            one.zero_grad()
        torch.testing.assert_close(optimizer.grad_norm.cpu(), expected, rtol=1e-5, atol=0)
        assert model.offload.grad_norm() is None
    for block in model.offload.iter_blocks():
        for name, value in block:
            torch.testing.assert_close(value.cpu(), plain.get_parameter(name).detach(), rtol=0, atol=1e-5)
    model.offload.close(remove=True)


def test_a_gradient_that_is_not_finite_and_came_before_the_last_backward_discards_the_step(tmp_path):
    torch.manual_seed(0)
    model = LeavingOut(3)
    model, optimizer = offload.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        storage=[str(tmp_path)],
        device_memory="100MB",
        host_memory="100MB",
        durability="step",
        **STREAMING,
    )
    before = {name: value.clone() for block in model.offload.iter_blocks() for name, value in block}
    hook = model.layers[1].linear.bias.register_hook(lambda grad: grad * float("inf"))
    with model.offload.no_sync():
        model(torch.randn(4, 8)).square().mean().backward()
    hook.remove()
    model.left_out = (1,)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    assert optimizer.discarded_steps == 1
    for block in model.offload.iter_blocks():
        assert all(torch.equal(value, before[name]) for name, value in block)
    model.offload.close(remove=True)

"""The global norm that a step which can be taken back is judged by, where nothing is clipped. The oracle is torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import offload
from offload.runtime import gradient_norms
from tests.fault.training import WIDTH, Model


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

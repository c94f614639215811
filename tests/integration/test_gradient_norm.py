"""The global norm that a step which can be taken back is judged by, where nothing is clipped. The oracle is torch's."""

from __future__ import annotations

import copy

import pytest
import torch

import offload
from offload.runtime import gradient_norms
from tests.fault.training import Model


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

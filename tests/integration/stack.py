"""A stack of small equal blocks through the store, for tests that delete a wait and look at the parameters."""

from __future__ import annotations

import torch
from torch import nn

import offload


class UpDown(nn.Module):
    """Rows of `width` and back over twice as many: some work, and a result that backward needs."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def take_steps(model, optimizer, x, n_steps):
    for _ in range(n_steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters_of(model):
    """All parameters by name, in host memory."""
    return {n: t.cpu().clone() for block in model.offload.iter_blocks() for n, t in block}


def train_stack(width, rows, settings, n_steps=3):
    """Parameters by name of five blocks, after so many steps on one batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*[UpDown(width) for _ in range(5)])
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **settings)
    try:
        x = torch.randn(rows, width).to(model.offload.device)
        take_steps(model, optimizer, x, n_steps)
        return parameters_of(model)
    finally:
        model.offload.close()


def differs(got, expected):
    """Whether any parameter has another bit."""
    return any(not torch.equal(got[name], expected[name]) for name in expected)

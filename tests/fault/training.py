"""A small run through the store with few transfers, and faults in them."""

from __future__ import annotations

import torch
from torch import nn

import offload
from offload._C import Engine
from offload.config import Config
from offload.errors import OffloadError
from offload.tiers import storage

GIVEN_UP = (OffloadError, OSError)
"""What a run may end with when a drive fails."""

STREAMING = {"step_aside": "never"} if "step_aside" in Config.model_fields else {}
"""Small models, too, are to go through the store."""

WIDTH = 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def inject(monkeypatch, faults):
    """Give every store that is made from now on an engine with these faults. Returns the engines made."""
    made = []

    def make(paths, **options):
        made.append(Engine(paths, inject=faults, **options))
        return made[-1]

    monkeypatch.setattr(storage, "Engine", make)
    return made


def make_run(directory, layers=3, lr=1e-2, **settings):
    """(model, optimizer) with everything but the root on storage."""
    torch.manual_seed(0)
    model = Model(layers)
    made = torch.optim.AdamW(model.parameters(), lr=lr)
    budgets = {"device_memory": "1MB", "host_memory": 2 * 2048 * 14 + 200_000, "chunk_elements": 2048}
    return offload.wrap(
        model, made, storage=[str(directory)], chunk_buffers=2, prefetch_blocks=1,
        **{**budgets, **STREAMING, **settings},
    )  # fmt: skip


def steps(model, optimizer, n_steps, seed=1):
    """Train; give the parameters by name afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for block in model.offload.iter_blocks() for name, tensor in block}

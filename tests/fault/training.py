"""A small run through the store with few transfers, and faults in them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import offload
from offload._C import Engine
from offload.errors import BudgetError, OffloadError
from offload.tiers import storage

GIVEN_UP = (OffloadError, OSError)
"""What a run may end with when a drive fails."""

STREAMING = {"step_aside": "never"}
"""Small models, too, are to go through the store."""

WIDTH = 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self, layers, head_width=1):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, head_width)

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


def make_run(directory, layers=3, optimizer=None, **settings):
    """(model, optimizer) with the smallest budgets that would do, as the refusal of less states them."""
    torch.manual_seed(0)
    model = Model(layers)
    made = optimizer(model) if optimizer else torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {
        "storage": [str(directory)], "chunk_elements": 2048, "chunk_buffers": 2, "prefetch_blocks": 1, **STREAMING,
        **settings,
    }  # fmt: skip
    return offload.wrap(model, made, **smallest_budgets(model, made, settings), **settings)


IN_MEMORY = {"device_memory": "1GB", "host_memory": "1GB", "storage": []}


def wrap_small(model, optimizer, **settings):
    """Wrapped in memory; with `storage` and without budgets, in the smallest that would do."""
    if not settings.get("storage"):
        return offload.wrap(model, optimizer, **{**IN_MEMORY, **settings})
    if "host_memory" not in settings:
        settings = {**STREAMING, "prefetch_blocks": 1, **settings}
        settings |= smallest_budgets(model, optimizer, settings)
    return offload.wrap(model, optimizer, **settings)


_BUDGETS = {}


def smallest_budgets(model, optimizer, settings):
    """What a refusal of less says would do. It is asked for once: loops over failing transfers make equal runs."""
    whole = [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    rest = {**settings, "storage": len(settings.get("storage", []))}
    key = (repr(model), repr(whole), repr(optimizer), repr(sorted(rest.items(), key=lambda item: item[0])))
    if key not in _BUDGETS:
        with pytest.raises(BudgetError) as refused:
            offload.wrap(model, optimizer, **{**settings, "device_memory": 1, "host_memory": 1})
        _BUDGETS[key] = {
            name: int(re.search(rf"{name}='(\d+)'", str(refused.value))[1])
            for name in ("device_memory", "host_memory")
        }
    return dict(_BUDGETS[key])


def parameters_of(model):
    """All parameters by name."""
    return {name: tensor.clone() for block in model.offload.iter_blocks() for name, tensor in block}


def steps(model, optimizer, n_steps, seed=1):
    """Train; give the parameters by name afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)

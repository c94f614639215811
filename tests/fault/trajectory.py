"""A run whose whole training state can be compared bit for bit, with everything that a resume has to bring back."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

import offload
from tests.fault.training import WIDTH, Model, smallest_budgets

BATCH = 4


class Data:
    """Batches drawn from a generator of its own, with a position that can be saved."""

    def __init__(self, seed=1):
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self.drawn = 0

    def next(self):
        self.drawn += 1
        return torch.randn(BATCH, 8, generator=self._generator)

    def state_dict(self):
        return {"generator": self._generator.get_state(), "drawn": self.drawn}

    def load_state_dict(self, state):
        self._generator.set_state(state["generator"])
        self.drawn = state["drawn"]


class Noisy(nn.Module):
    """The small model, with dropout, a buffer that forward changes, and noise from numpy and Python."""

    def __init__(self, layers, dtype, head_width):
        super().__init__()
        self.inner = Model(layers, head_width).to(dtype)
        self.dtype = dtype
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = x + float(np.random.random()) + random.random()
        return self.inner(torch.nn.functional.dropout(x, 0.1).to(self.dtype)).float() + self.calls * 1e-3


class Run:
    """Model, optimizer of two groups, a scheduler and data, wrapped with `settings`."""

    def __init__(self, *, layers=3, dtype=torch.bfloat16, head_width=1, **settings):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = Noisy(layers, dtype, head_width)
        vectors = [p for p in model.parameters() if p.dim() < 2]
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
        )
        settings = {"chunk_elements": 2048, "chunk_buffers": 2, "step_aside": "never", **settings}
        if "device_memory" not in settings:
            settings = {**smallest_budgets(model, optimizer, settings), **settings}
        self.model, self.optimizer = offload.wrap(model, optimizer, **settings)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=2e-2, total_steps=10_000)
        self.data = Data()
        self.losses = []

    @property
    def tracked(self):
        return {"scheduler": self.scheduler, "data": self.data}

    def step(self):
        """One step; its loss."""
        loss = self.model(self.data.next()).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def steps(self, n):
        """Losses of the next `n` steps."""
        return [self.step() for _ in range(n)]

    def close(self):
        """End the run."""
        self.model.offload.close()

    def save(self, directory, **more):
        """A checkpoint with all that is tracked."""
        return offload.save(self.model, str(directory), state=self.tracked, **more)

    def resume(self, directory):
        """Go on from it."""
        return offload.resume(self.model, str(directory), state=self.tracked)


__all__ = ["WIDTH", "Data", "Noisy", "Run"]

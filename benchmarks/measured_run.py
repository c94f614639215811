"""A real run of a fixed plan, and what it takes: bytes moved, bytes held by each tier, seconds of a step.

Nothing here asks the planner: bytes held come from the arenas, the store, torch's own allocator (as its profiler
reports it) and the tensors that wait for backward; bytes moved from the engine's counters.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import offload
from offload.config import Config
from offload.planner.hardware import Hardware
from offload.planner.plan import Budgets, Plan
from offload.planner.search import make_plan
from offload.planner.workload import Workload
from offload.transfer.io_engine import UpdatePipeline

MEMORY_NBYTES = 3 << 30
"""Budget of either memory: more than any of the plans here needs."""


def staging_nbytes() -> int:
    """Host memory of the update pipeline's chunk buffers with the default settings."""
    settings = Config()
    return UpdatePipeline.buffer_nbytes_required(settings.chunk_elements, settings.chunk_buffers)


def fixed_plan(workload: Workload, hardware: Hardware, batch_samples: int, **fixed: Any) -> Plan:
    """The plan with those choices; state is placed in the chunks that the runtime uses."""
    budgets = Budgets(MEMORY_NBYTES, MEMORY_NBYTES, staging_nbytes=staging_nbytes())
    plan = make_plan(workload, hardware, budgets, fixed, batch_samples=batch_samples)
    return plan.model_copy(update={"chunk_elements": Config().chunk_elements})


@dataclass(frozen=True)
class Bytes:
    """Of one step."""

    read: float
    written: float


class MeasuredRun:
    """`model` under `plan` on the CPU. `loss(model)` computes a batch's loss; use as a context manager."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        storage: str,
        loss: Callable[[nn.Module], torch.Tensor],
        max_grad_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer = offload.wrap(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-4),
            device="cpu",
            step_aside="never",
            device_memory=MEMORY_NBYTES,
            host_memory=MEMORY_NBYTES,
            storage=[storage],
            plan=plan.to_json(),
            max_grad_norm=max_grad_norm,
        )
        self.engine = self.model.offload
        self._loss = loss
        self._waiting: dict[str, int] = {"device": 0, "host": 0, "storage": 0}

    def __enter__(self) -> MeasuredRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def step(self) -> float:
        """One training step; its seconds, from the end of the one before."""
        start = time.perf_counter()
        loss = self._loss(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def quiesce(self) -> None:
        """Wait for what is in flight; updates that wait for their block's next use go on waiting."""
        for block in [*self.engine.blocks, self.engine.root]:
            self.engine._scheduler.wait_resident(block)

    def bytes_per_step(self, n_steps: int = 2) -> Bytes:
        """Counted between two moments at which nothing is in flight."""
        self.quiesce()
        before = self.engine.counters()
        for _ in range(n_steps):
            self.step()
        self.quiesce()
        after = self.engine.counters()
        moved = {key: (after[key] - before[key]) / n_steps for key in after}
        return Bytes(moved["read_bytes"], moved["written_bytes"])

    def peak_nbytes(self) -> dict[str, int]:
        """Most bytes that each tier holds during one step.

        Device: slots, gradient buffers, the root with its gradients, and everything torch's allocator holds at once
        during the step; tensors that wait in host memory count there. Storage: extents that have been allocated.
        """
        parts = self.engine._assembly
        planes = [slot.bytes_tensor for slot in parts.slots] + [g.plane for g in parts.grad_buffers]
        at_home = parts.placement.params_in_host
        if parts.placement.params_on_device:
            planes += [b.slot.bytes_tensor for b in parts.blocks if not at_home[b.index]]
        planes += [parts.root.slot.bytes_tensor, parts.root.grad_buffer.plane]
        fixed = sum(plane.numel() * plane.element_size() for plane in planes)
        self.quiesce()
        with (
            self._watched_activations() as peaks,
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
        ):
            self.step()
            self.quiesce()
        held = peak = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return {
            "device": fixed + peak - peaks["host"],
            "host": parts.resources.arenas[1]._used_nbytes + peaks["host"],
            "storage": parts.resources.store._end_nbytes,
        }

    @contextlib.contextmanager
    def _watched_activations(self) -> Iterator[dict[str, int]]:
        """Most bytes of activations in each tier at once."""
        store, peaks = self.engine.activations, {"device": 0, "host": 0, "storage": 0}
        original = store.swap_out

        def swap_out(*args: Any, **kwargs: Any) -> Any:
            activation = original(*args, **kwargs)
            for tier in peaks:
                peaks[tier] = max(peaks[tier], sum(h.nbytes for h in store._order if h.tier == tier))
            return activation

        store.swap_out = swap_out
        try:
            yield peaks
        finally:
            del store.swap_out

"""Rates of a model's own blocks and root here, and what computing, updating and storing take from each other.

[Note: what is timed] One training step without anything being moved: every block forward without a graph, root and
loss, then block after block forward with its graph and backward, gradients copied into fp32 planes as they are made.
It is timed by kind of work, so that element-wise operations, attention, allocation and dispatch are in the rates, at
the model's own shapes and micro-batch. Blocks follow each other as in training: none finds its weights in a cache that
a real step would have used for others.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload.model.blocks import cut
from offload.planner.workload import Workload
from offload.profiling.compute_probe import UpdateLoop
from offload.profiling.working_set import standing_in

WORK = ("forward", "recompute", "backward", "root_forward", "root_backward")


class _Streamed(torch.autograd.Function):
    """A block as the runtime runs it: forward without a graph, forward again in backward."""

    @staticmethod
    def forward(
        ctx: Any, probe: BlockProbe, call: Callable[..., Any], tree: Any, *tensors: torch.Tensor
    ) -> Any:
        ctx.probe, ctx.call, ctx.tree = probe, call, tree
        ctx.save_for_backward(*tensors)
        ctx.wants = [t.requires_grad for t in tensors]
        with probe.timed("forward"):
            result = _called(call, tree, list(tensors))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        probe = ctx.probe
        tensors = [t.detach().requires_grad_(w) for t, w in zip(ctx.saved_tensors, ctx.wants, strict=True)]
        with probe.timed("recompute"), torch.enable_grad():
            result = _called(ctx.call, ctx.tree, tensors)
        with probe.timed("backward"):
            outputs = result if isinstance(result, tuple) else (result,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g is not None]
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return (None, None, None, *(t.grad for t in tensors))


def _called(call: Callable[..., Any], tree: Any, tensors: list[torch.Tensor]) -> Any:
    leaves, spec = tree
    given = iter(tensors)
    args, kwargs = pytree.tree_unflatten([next(given) if leaf is None else leaf[0] for leaf in leaves], spec)
    return call(*args, **kwargs)


class BlockProbe:
    """Times the work of `model`, which it changes the forward of its blocks for while it measures.

    `workload` is the model's own; `samples` the micro-batch. `loss(model)` computes one micro-batch's loss. `settle`
    waits for the device that computes, where that is another than the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        workload: Workload,
        samples: int,
        loss: Callable[[nn.Module], torch.Tensor],
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self._settle = settle
        self._model, self._workload, self._samples, self._loss = model, workload, samples, loss
        self._blocks = cut(model).blocks
        self._seconds: dict[str, float] = defaultdict(float)
        largest = max(sum(p.numel() for p in block.parameters()) for _, block in self._blocks)
        root_numel = workload.root_trainable_numel
        device = next(model.parameters()).device
        self._plane = torch.zeros(max(largest, root_numel), dtype=torch.float32, device=device)

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Charge the time inside to `work`."""
        self._settle()
        start = time.perf_counter()
        yield
        self._settle()
        self._seconds[work] += time.perf_counter() - start

    def step_seconds(self) -> dict[str, float]:
        """Seconds of one step by kind of work."""
        self._seconds.clear()
        handles = [
            p.register_post_accumulate_grad_hook(self._take_gradient)
            for p in self._model.parameters()
            if p.requires_grad
        ]
        try:
            with standing_in(self._blocks, self._streamed):
                self._settle()
                start = time.perf_counter()
                loss = self._loss(self._model)
                self._settle()
                middle = time.perf_counter()
                loss.backward()
                self._settle()
                end = time.perf_counter()
        finally:
            for handle in handles:
                handle.remove()
        found = dict(self._seconds)
        found["root_forward"] = middle - start - found["forward"]
        found["root_backward"] = end - middle - found["recompute"] - found["backward"]
        return found

    def flops_per_s(self, seconds: dict[str, float]) -> dict[str, float]:
        """`Hardware.work_flops_per_s` from the seconds of one step."""
        blocks = self._workload.blocks
        flops = {
            "forward": sum(b.flops_per_sample for b in blocks),
            "recompute": sum(b.flops_per_sample for b in blocks),
            "backward": 2 * sum(b.flops_per_sample for b in blocks),
            "root_forward": self._workload.root_flops_per_sample,
            "root_backward": 2 * self._workload.root_flops_per_sample,
        }
        return {work: self._samples * flops[work] / seconds[work] for work in WORK}

    def _streamed(self, _position: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        tree = ([None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves], spec)
        return _Streamed.apply(self, original, tree, *tensors)

    def _take_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._plane[: parameter.numel()].view(parameter.shape).copy_(parameter.grad)
        parameter.grad = None


@dataclass(frozen=True)
class Measured:
    """What one look at the machine has found: fields of `Hardware`."""

    work_flops_per_s: dict[str, float]
    adam_params_per_s: float
    compute_speed_beside_update: float
    update_speed_beside_compute: float
    compute_speed_beside_storage: float
    storage_speed_beside_compute: float


def measure(probe: BlockProbe, updates: UpdateLoop, stream: UpdateLoop | None, n_steps: int = 2) -> Measured:
    """Rates of `n_steps` steps alone, and what is left of them beside updates in DRAM, and beside the update pipeline
    with its state on storage (`stream`).

    Medians for the rates; for the shares, the same number of steps with and without the other work. Beside the
    pipeline, computing loses to its kernels as it does to updates in DRAM, for as long as they run; the rest of what
    it loses is the drives'.
    """
    probe.step_seconds()
    alone = [probe.step_seconds() for _ in range(n_steps)]
    alone_s = sum(sum(step.values()) for step in alone)
    adam_per_s = updates.params_per_s(alone_s / n_steps)
    beside_update_s, beside_per_s, _ = _beside(probe, updates, n_steps)
    beside_update = min(1.0, alone_s / beside_update_s)
    beside_storage = storage_share = 1.0
    if stream is not None:
        stream_per_s = stream.params_per_s(alone_s / n_steps)
        elapsed_s, beside_stream_per_s, kernel_share = _beside(probe, stream, n_steps)
        beside_storage = alone_s / elapsed_s / (1 - kernel_share * (1 - beside_update))
        storage_share = beside_stream_per_s / stream_per_s
    seconds = {work: statistics.median(step[work] for step in alone) for work in WORK}
    return Measured(
        work_flops_per_s=probe.flops_per_s(seconds),
        adam_params_per_s=adam_per_s,
        compute_speed_beside_update=beside_update,
        update_speed_beside_compute=min(1.0, beside_per_s / adam_per_s),
        compute_speed_beside_storage=min(1.0, beside_storage),
        storage_speed_beside_compute=min(1.0, storage_share),
    )


def _beside(probe: BlockProbe, updates: UpdateLoop, n_steps: int) -> tuple[float, float, float]:
    """Seconds of `n_steps` steps beside `updates`, parameters these made a second, and the share of the time that
    their kernels ran."""
    with updates.running() as count:
        start, first, kernels = time.perf_counter(), count(), updates.kernel_seconds
        for _ in range(n_steps):
            probe.step_seconds()
        elapsed_s = time.perf_counter() - start
        return (
            elapsed_s,
            (count() - first) / elapsed_s,
            min(1.0, (updates.kernel_seconds - kernels) / elapsed_s),
        )

"""The update of parameters whose whole state is in the memory of a device of its own: torch's AdamW, fused, on fp32.

Only for what is not streamed. On a CPU the extension's kernels do this, so that streamed and unstreamed training have
the same bits; on another device the two differ as torch's AdamW differs from ours (see docs/architecture.md).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.optim import adam, adamw

from offload.model.flat import FlatBuffer
from offload.stores.block_store import BlockRecord
from offload.tiers.device import DeviceTier
from offload.transfer.io_engine import Hyper

Segments = list[tuple[int, int, Hyper]]


class _BufferState:
    """fp32 master and moments of one flat buffer; the master is the parameter plane itself when that is fp32."""

    def __init__(self, plane: torch.Tensor, sources: list[tuple[int, torch.Tensor]]) -> None:
        self.plane = plane
        self.master = plane if plane.dtype == torch.float32 else torch.zeros_like(plane, dtype=torch.float32)
        for start, source in sources:
            self.master[start : start + source.numel()].copy_(source.reshape(-1))
        if self.master is not plane:
            self.plane.copy_(self.master)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.steps = torch.zeros((), dtype=torch.float32, device=plane.device)

    def update(self, segments: Segments, grads: torch.Tensor) -> None:
        """One step of every segment; those with the same hyperparameters go in one call. `grads` is scaled in place."""
        alike: dict[tuple[float, ...], Segments] = defaultdict(list)
        for segment in segments:
            hyper = segment[2]
            alike[
                hyper.lr,
                hyper.beta1,
                hyper.beta2,
                hyper.eps,
                hyper.weight_decay,
                hyper.step,
                hyper.decoupled,
                hyper.grad_scale,
                hyper.maximize,
            ].append(segment)
        for group in alike.values():
            self._update_alike(group, grads)
        if self.master is not self.plane:
            self.plane.copy_(self.master)

    def _update_alike(self, segments: Segments, grads: torch.Tensor) -> None:
        hyper = segments[0][2]

        def views(plane: torch.Tensor) -> list[torch.Tensor]:
            return [plane[start : start + n] for start, n, _ in segments]

        if hyper.grad_scale != 1.0:
            torch._foreach_mul_(views(grads), hyper.grad_scale)
        function = adamw.adamw if hyper.decoupled else adam.adam
        function(
            views(self.master),
            views(grads),
            views(self.exp_avg),
            views(self.exp_avg_sq),
            [],
            [torch.full_like(self.steps, hyper.step - 1) for _ in segments],
            fused=True,
            amsgrad=False,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            lr=hyper.lr,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            maximize=hyper.maximize,
        )


class InDeviceState:
    """Parameters, masters and moments of the root, all in device memory. Takes the parameters' present values."""

    def __init__(self, root: BlockRecord, device: DeviceTier) -> None:
        self._root = root
        self._states: dict[int, _BufferState] = {}
        for position, buffer in enumerate(root.layout.buffers):
            plane = root.plane(buffer)
            plane.zero_()
            sources = [(s.start, s.parameter.data.to(device.torch_device)) for s in buffer.segments]
            if buffer.trainable:
                self._states[position] = _BufferState(plane, sources)
            else:
                for start, source in sources:
                    plane[start : start + source.numel()].copy_(source.reshape(-1))
        root.bind()

    def update(self, segments_of: list[Segments]) -> None:
        """Update with the gradients in the root's gradient buffer, in the order of compute."""
        held = self._root.grad_buffer
        if held is None:
            return
        for position, segments in enumerate(segments_of):
            if segments:
                self._states[position].update(
                    segments, self._grads(self._root.layout.buffers[position], held.plane)
                )

    @staticmethod
    def _grads(buffer: FlatBuffer, plane: torch.Tensor) -> torch.Tensor:
        return plane[buffer.grad_start : buffer.grad_start + buffer.n_elements]


def state_nbytes(root_buffers: tuple[FlatBuffer, ...]) -> int:
    """Device memory beside planes and gradients: moments, and masters of planes that are not fp32."""
    per = {True: 8, False: 12}
    return sum(b.n_elements * per[b.dtype == torch.float32] for b in root_buffers if b.trainable)

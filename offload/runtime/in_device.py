"""The update of parameters whose whole state is in the memory of a device of its own: torch's optimizers, on fp32.

Only for what is not streamed. On a CPU the extension's kernels do this, so that streamed and unstreamed training have
the same bits; on another device the two differ as torch's AdamW differs from ours (see docs/architecture.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.optim import adam, adamw, sgd

from offload.model.flat import FlatBuffer
from offload.runtime.update_jobs import Segments
from offload.stores.block_store import BlockRecord
from offload.tiers.device import DeviceTier
from offload.transfer.io_engine import Hyper, merge_master, split_master
from offload.update_rules import UpdateRule

_ALIKE = (
    "lr", "beta1", "beta2", "eps", "weight_decay", "step", "decoupled", "grad_scale", "maximize", "momentum",
    "dampening", "nesterov",
)  # fmt: skip

Tensors = list[torch.Tensor]


def _adamw(params: Tensors, grads: Tensors, moments: list[Tensors], hyper: Hyper) -> None:
    steps = list(
        torch.full((len(params),), hyper.step - 1, dtype=torch.float32, device=params[0].device).unbind()
    )
    function = adamw.adamw if hyper.decoupled else adam.adam
    function(
        params,
        grads,
        moments[0],
        moments[1],
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        maximize=hyper.maximize,
    )


def _sgd(params: Tensors, grads: Tensors, moments: list[Tensors], hyper: Hyper) -> None:
    buffers: list[torch.Tensor | None] = [None] * len(params)
    if hyper.momentum and hyper.step > 1:
        buffers = list(moments[0])
    sgd.sgd(
        params,
        grads,
        buffers,
        foreach=True,
        weight_decay=hyper.weight_decay,
        momentum=hyper.momentum,
        lr=hyper.lr,
        dampening=hyper.dampening,
        nesterov=hyper.nesterov,
        maximize=hyper.maximize,
    )
    if hyper.momentum and hyper.step == 1:  # torch has made them
        for ours, made in zip(moments[0], buffers, strict=True):
            if made is not None:
                ours.copy_(made)


def _lion(params: Tensors, grads: Tensors, moments: list[Tensors], hyper: Hyper) -> None:
    if hyper.maximize:
        torch._foreach_neg_(grads)
    updates = torch._foreach_mul(moments[0], hyper.beta1)
    torch._foreach_add_(updates, grads, alpha=1 - hyper.beta1)
    torch._foreach_sign_(updates)
    torch._foreach_mul_(params, 1 - hyper.lr * hyper.weight_decay)
    torch._foreach_add_(params, updates, alpha=-hyper.lr)
    torch._foreach_mul_(moments[0], hyper.beta2)
    torch._foreach_add_(moments[0], grads, alpha=1 - hyper.beta2)


_STEPS: dict[str, Callable[[Tensors, Tensors, list[Tensors], Hyper], None]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
}
"""By rule (`UpdateRule.made_on_device`)."""


class _BufferState:
    """fp32 master and moments of one flat buffer; the master is the parameter plane itself when that is fp32."""

    def __init__(
        self, plane: torch.Tensor, sources: list[tuple[int, torch.Tensor]], rule: UpdateRule
    ) -> None:
        self.plane, self._step = plane, _STEPS[rule.name]
        self.master = plane if plane.dtype == torch.float32 else torch.zeros_like(plane, dtype=torch.float32)
        for start, source in sources:
            self.master[start : start + source.numel()].copy_(source.reshape(-1))
        if self.master is not plane:
            self.plane.copy_(self.master)
        self.moments = [torch.zeros_like(self.master) for _ in rule.planes]

    def update(self, segments: Segments, grads: torch.Tensor) -> None:
        """One step of every segment; those with the same hyperparameters go in one call. `grads` is scaled in place."""
        alike: dict[tuple[float, ...], Segments] = defaultdict(list)
        for segment in segments:
            alike[tuple(getattr(segment[2], name) for name in _ALIKE)].append(segment)
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
        moments = [views(plane) for plane in self.moments]
        self._step(views(self.master), views(grads), moments, hyper)


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
                self._states[position] = _BufferState(plane, sources, buffer.rule)
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

    def chunk_of(self, position: int, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Elements `start` to `start + n` as a parameter plane and a chunk record, uint8 in host memory."""
        buffer, state = self._root.layout.buffers[position], self._states[position]
        master, *moments = (t[start : start + n].cpu() for t in (state.master, *state.moments))
        planes = [t.view(torch.uint8) for t in moments]
        if buffer.codec == "fp32":
            return master.view(torch.uint8), torch.cat(
                [torch.empty(0, dtype=torch.uint8, device="cpu"), *planes]
            )
        hi, lo = (torch.empty(n, dtype=dtype, device="cpu") for dtype in (torch.bfloat16, torch.int16))
        split_master(master.data_ptr(), hi.data_ptr(), lo.data_ptr(), n)
        return hi.view(torch.uint8), torch.cat([lo.view(torch.uint8), *planes])

    def set_chunk(self, position: int, start: int, param: torch.Tensor, record: torch.Tensor) -> None:
        """Replace elements from `start` on by a parameter plane and a chunk record, as `chunk_of` gives them."""
        buffer, state = self._root.layout.buffers[position], self._states[position]
        split = buffer.codec == "split_bf16"
        n = param.numel() // (2 if split else 4)
        lo_nbytes = 2 * n if split else 0
        master = torch.empty(n, dtype=torch.float32, device="cpu") if split else param.view(torch.float32)
        if split:
            merge_master(param.data_ptr(), record.data_ptr(), master.data_ptr(), n)
        state.master[start : start + n].copy_(master)
        for i, moment in enumerate(state.moments):
            begin = lo_nbytes + i * 4 * n
            moment[start : start + n].copy_(record[begin : begin + 4 * n].view(torch.float32))
        if split:
            state.plane[start : start + n].copy_(state.master[start : start + n])

    @staticmethod
    def _grads(buffer: FlatBuffer, plane: torch.Tensor) -> torch.Tensor:
        return plane[buffer.grad_start : buffer.grad_start + buffer.n_elements]


def state_nbytes(root_buffers: tuple[FlatBuffer, ...], n_moments: int) -> int:
    """Device memory beside planes and gradients: moments, and masters of planes that are not fp32."""
    return sum(
        b.n_elements * 4 * (n_moments + (b.dtype != torch.float32)) for b in root_buffers if b.trainable
    )

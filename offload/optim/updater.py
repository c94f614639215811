"""Updates of flat buffers whose parameters and chunk records are in a device's memory."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator

import torch

from offload.model.flat import FlatBuffer
from offload.optim.torch_rules import UPDATES, Views, adamw_scalars
from offload.planner.states_on_device import SCRATCH_PLANES, scratch_nbytes
from offload.tiers.device import DeviceTier
from offload.transfer.io_engine import Hyper
from offload.update_rules import ADAMW, LO_NBYTES

logger = logging.getLogger("offload")

_read_of = operator.attrgetter(
    "lr", "beta1", "beta2", "eps", "weight_decay", "step", "decoupled", "grad_scale", "maximize", "momentum",
    "dampening", "nesterov",
)  # fmt: skip
"""What updates of fp32 moments depend on; the noise that is left is that of other moments."""

Fused = Callable[..., None]
"""`fused_adamw.update`."""


class Updater:
    """Owns what updates need in between: `scratch_nbytes` of device memory, for buffers of at most `n_elements`."""

    def __init__(self, n_elements: int, device: DeviceTier, fused: Fused | None = None) -> None:
        scratch = device.allocate(scratch_nbytes(4 * n_elements)).view(torch.float32)
        self._scratch = scratch.view(SCRATCH_PLANES, -1)
        self._piece_elements = self._scratch.shape[1]
        self._divisor = torch.empty((), dtype=torch.float32, device=device.torch_device)
        self._fused = fused

    def update(
        self,
        buffer: FlatBuffer,
        plane: torch.Tensor,
        records: torch.Tensor,
        grads: torch.Tensor,
        segments: list[tuple[int, int, Hyper]],
    ) -> None:
        """One step of the segments (start, n, hyperparameters) of a buffer, in the order of compute.

        `plane` are its parameters, `records` (uint8) all its chunk records, `grads` its gradients in bf16 or fp32.
        """
        for start, stop, hyper in _joined(segments):
            if self._fused is not None and buffer.rule == ADAMW:
                with torch.cuda.device_of(plane):  # Triton launches on the current one, which may be another
                    self._fused(buffer, plane, records, grads, start, stop, adamw_scalars(hyper))
                continue
            for views in self._views(buffer, plane, records, grads, start, stop):
                UPDATES[buffer.rule.name](views, hyper)

    def _views(
        self,
        buffer: FlatBuffer,
        plane: torch.Tensor,
        records: torch.Tensor,
        grads: torch.Tensor,
        start: int,
        stop: int,
    ) -> Iterator[Views]:
        """Elements `start` to `stop` in pieces: some whole chunks at once, or a part of one."""
        size, most = buffer.chunk_elements, self._piece_elements
        while start < stop:
            whole = start % size == 0 and stop - start >= size and size <= most
            n_chunks = min(most, stop - start) // size if whole else 1
            end = start + n_chunks * size if whole else min(stop, start - start % size + size, start + most)
            shape = (n_chunks, -1)
            lo, moments = _records(buffer, records, start, end, n_chunks)
            first, second, third = (scratch[: end - start].view(shape) for scratch in self._scratch)
            yield Views(
                plane[start:end].view(shape),
                lo,
                grads[start:end].view(shape),
                moments,
                (first, second, third),
                self._divisor,
            )
            start = end


def _joined(segments: list[tuple[int, int, Hyper]]) -> list[tuple[int, int, Hyper]]:
    """(start, stop, hyperparameters): neighbours that are updated alike as one, since a model has hundreds of
    parameters and every launch takes its time."""
    joined: list[tuple[int, int, Hyper]] = []
    for start, n, hyper in segments:
        first, stop = start, start + n
        if joined and joined[-1][1] == start and _read_of(joined[-1][2]) == _read_of(hyper):
            first, _, _ = joined.pop()
        joined.append((first, stop, hyper))
    return joined


def _records(
    buffer: FlatBuffer, records: torch.Tensor, start: int, end: int, n_chunks: int
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
    """`lo` and the moments of elements `start` to `end`, each of shape (chunks, elements): of `n_chunks` records, whose
    planes are a record apart, or of a part of one."""
    index, within = divmod(start, buffer.chunk_elements)
    in_record = min(buffer.chunk_elements, buffer.n_elements - index * buffer.chunk_elements)
    begin, n = buffer.record_begin(index), (end - start) // n_chunks

    def plane(offset_nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        typed, width = records.view(dtype), dtype.itemsize
        stride = buffer.record_nbytes(buffer.chunk_elements) // width
        first = (begin + offset_nbytes) // width + within
        return typed.as_strided((n_chunks, n), (stride, 1), typed.storage_offset() + first)

    lo_nbytes = LO_NBYTES[buffer.codec] * in_record
    moments = tuple(
        plane(lo_nbytes + 4 * number * in_record, torch.float32) for number in range(len(buffer.rule.planes))
    )
    return plane(0, torch.int16) if lo_nbytes else None, moments


def fused_for(device: DeviceTier) -> Fused | None:
    """The fused AdamW, where the device can run it and it has given the bits of torch's operations just now.

    Where it is missing or refuses, the log says so: an update then takes eight times the memory traffic.
    """
    if device.torch_device.type != "cuda":
        return None
    fused, why_not = fused_or_why_not(device)
    if fused is None:
        logger.warning("updates on the device are made in torch's operations: %s", why_not)
    return fused


def fused_or_why_not(device: DeviceTier) -> tuple[Fused | None, str]:
    """The fused AdamW, or what keeps the device from it."""
    try:
        from offload.optim import fused_adamw

        right = _same_bits(fused_adamw.update, device)
    except Exception as error:  # no Triton, no compiler, a processor it does not know: whatever it raises
        return None, str(error)
    return (fused_adamw.update, "") if right else (None, "Triton's kernel gives other bits here")


def _same_bits(fused: Fused, device: DeviceTier) -> bool:
    """Whether two steps of both have the same bits, for both codecs. Each kind of update is compiled for it, once on a
    machine, which takes a second or less: so gradients are as wide as parameters, and Adam's decay stands for both."""
    hypers = [Hyper(lr=1e-2, weight_decay=0.1, decoupled=False, step=step) for step in (1, 3)]
    for dtype in (torch.bfloat16, torch.float32):
        buffer = FlatBuffer(dtype, True, (), 3 * 2048, 0, 0, ADAMW, 2048)
        made: list[list[torch.Tensor]] = []
        for kernel in (fused, None):
            plane, records, grads = state = _example(buffer, device.torch_device)
            updater = Updater(buffer.n_elements, device, kernel)
            for hyper in hypers:
                updater.update(buffer, plane, records, grads, [(0, 5000, hyper), (5120, 1024, hyper)])
            made.append([t.view(torch.uint8) for t in state])
        if not all(torch.equal(one, other) for one, other in zip(*made, strict=True)):
            return False
    return True


def _example(buffer: FlatBuffer, where: torch.device) -> list[torch.Tensor]:
    """Parameters, records and gradients of a buffer; moments begin as zeros."""
    generator = torch.Generator("cpu").manual_seed(0)
    plane, grads = (
        torch.randn(buffer.n_elements, generator=generator, device="cpu").to(buffer.dtype) for _ in range(2)
    )
    records = torch.zeros(buffer.state_nbytes, dtype=torch.uint8, device="cpu")
    return [t.to(where) for t in (plane, records, grads)]

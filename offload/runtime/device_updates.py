"""Updates of what stays in the memory of a device of its own: made there, in the order of compute, when they are due.

Parameters and chunk records are laid out as elsewhere, so that whoever reads or writes training state finds it as
usual. Gradients are read where backward has left them; nothing crosses the bus.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from offload.model.flat import FlatBuffer
from offload.planner.on_device import SCRATCH_PLANES, scratch_nbytes
from offload.runtime.device_rules import UPDATES, Views
from offload.runtime.recording import computing
from offload.runtime.update_jobs import Segments
from offload.stores.block_store import BlockRecord
from offload.telemetry import SpanLog
from offload.tiers.device import DeviceTier
from offload.update_rules import LO_NBYTES


class DeviceUpdates:
    """Owns what updates of these `on_device` blocks need in between, `scratch_nbytes` of device memory."""

    def __init__(self, blocks: list[BlockRecord], device: DeviceTier, spans: SpanLog) -> None:
        self._device, self._spans = device, spans
        nbytes = scratch_nbytes(max(4 * block.layout.grad_elements for block in blocks))
        self._scratch = device.allocate(nbytes).view(torch.float32).view(SCRATCH_PLANES, -1)
        self._piece_elements = self._scratch.shape[1]
        self._divisor = torch.empty((), dtype=torch.float32, device=device.torch_device)

    def update(self, block: BlockRecord, segments_of: list[Segments]) -> None:
        """Update with the gradients in the block's gradient buffer. Compute given later sees the new parameters."""
        held = block.grad_buffer
        if held is None:
            return
        with computing(self._device, self._spans, "update", block):
            for position, segments in enumerate(segments_of):
                buffer = block.layout.buffers[position]
                grads = held.plane[buffer.grad_start : buffer.grad_start + buffer.n_elements]
                for start, n, hyper in segments:
                    for views in self._views(block, position, grads, start, start + n):
                        UPDATES[buffer.rule.name](views, hyper)

    def finish(self) -> None:
        """Wait until the updates given so far have been made."""
        self._device.mark().wait()

    def _views(
        self, block: BlockRecord, position: int, grads: torch.Tensor, start: int, stop: int
    ) -> Iterator[Views]:
        """Elements `start` to `stop` in pieces: some whole chunks at once, or a part of one."""
        buffer = block.layout.buffers[position]
        plane, size = block.plane(buffer), buffer.chunk_elements
        while start < stop:
            whole = start % size == 0 and stop - start >= size and size <= self._piece_elements
            n_chunks = min(self._piece_elements, stop - start) // size if whole else 1
            end = start + n_chunks * size if whole else min(stop, start - start % size + size)
            end = min(end, start + self._piece_elements)
            shape = (n_chunks, -1)
            lo, moments = self._records(block, position, buffer, start, end, n_chunks)
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

    def _records(
        self, block: BlockRecord, position: int, buffer: FlatBuffer, start: int, end: int, n_chunks: int
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """`lo` and the moments of elements `start` to `end`, each of shape (chunks, elements): of `n_chunks` records,
        whose planes are a record apart, or of a part of one."""
        records = block.states[position].host
        if records is None:
            raise RuntimeError(
                f"block {block.name}: its optimizer state is not on the device; please report this"
            )
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
            plane(lo_nbytes + 4 * number * in_record, torch.float32)
            for number in range(len(buffer.rule.planes))
        )
        return plane(0, torch.int16) if lo_nbytes else None, moments

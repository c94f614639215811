"""The update of a block as jobs of the pipeline: which elements, where each plane is read and where it is written.

A job updates one flat buffer, or a part of the root's. When it is submitted, and for which blocks, is the scheduler's.

[Note: the root in parts] The next forward waits for the root's update, and that for its last gradients; nothing hides
either. On a device with memory of its own the root therefore goes through in parts: while one part's gradients leave
the device, the one before is updated, and the parameters of the one before that are on their way back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from offload.model.flat import FlatBuffer
from offload.runtime.chunk_update import chunk_update
from offload.runtime.early_root import Range, split
from offload.stores.block_store import BlockRecord
from offload.tiers.storage import Store
from offload.transfer.io_engine import Hyper, Ticket, UpdateJob
from offload.types import round_up

Segments = list[tuple[int, int, Hyper]]
"""Of a flat buffer, (start, n, hyperparameters) of what is updated."""

HyperOf = Callable[[torch.nn.Parameter, int], "Hyper"]
"""Hyperparameters of this step's update of a parameter, which begins at this element of its flat buffer; counts the
step."""


def touched_segments(block: BlockRecord, hyper_of: HyperOf) -> list[Segments]:
    """Per flat buffer, every parameter that has a gradient."""
    return [
        [
            (segment.start, segment.numel, hyper_of(segment.parameter, segment.start))
            for segment in buffer.segments
            if buffer.trainable and id(segment.parameter) in block.touched
        ]
        for buffer in block.layout.buffers
    ]


@dataclass
class Part:
    """Elements `start` to before `stop` of the flat buffer at `position`, whole chunks, and what of them is updated.

    `gate` completes when the gradients have arrived where the update looks for them; None: they have.
    """

    position: int
    start: int
    stop: int
    segments: Segments
    gate: Ticket | None = None

    def slot_bytes(self, buffer: FlatBuffer) -> tuple[int, int]:
        """Of its parameters: first byte of the block's slot, byte after the last."""
        plane, itemsize = buffer.plane_offset_nbytes, buffer.dtype.itemsize
        return plane + self.start * itemsize, plane + self.stop * itemsize

    def within(self, ranges: list[Range]) -> list[Range]:
        """What of the part is in these ranges."""
        inside, _ = split(self.start, self.stop - self.start, ranges)
        return [(start, start + n) for start, n in inside]


def parts_of(block: BlockRecord, segments_of: list[Segments], n_parts: int = 1) -> list[Part]:
    """The trainable flat buffers, each in so many parts at most; in one where a rule reads whole gradients."""
    parts: list[Part] = []
    for position, buffer in enumerate(block.layout.buffers):
        if not buffer.trainable:
            continue
        if n_parts == 1 or buffer.rule.whole_gradients:
            parts.append(Part(position, 0, buffer.n_elements, segments_of[position]))
            continue
        step = round_up(buffer.n_elements // n_parts, buffer.chunk_elements)
        for start in range(0, buffer.n_elements, step):
            stop = min(start + step, buffer.n_elements)
            pieces = [
                (split(first, n, [(start, stop)])[0], hyper) for first, n, hyper in segments_of[position]
            ]
            segments = [(*piece, hyper) for inside, hyper in pieces for piece in inside]
            parts.append(Part(position, start, stop, segments))
    return parts


def needs_job(block: BlockRecord, part: Part) -> bool:
    """Whether the pipeline has anything to do: where a block has two sides, what has no gradient goes to the other side
    as it is."""
    return bool(part.segments) or block.sides is not None


def param_offset(block: BlockRecord, position: int) -> int:
    """Where the parameter plane of a flat buffer is in the store, in bytes; -1 where it is in memory only."""
    if block.param_offset < 0:
        return -1
    return block.param_offset + block.layout.buffers[position].plane_offset_nbytes


def make_job(
    block: BlockRecord,
    part: Part,
    *,
    read_param: bool,
    only: list[Range],
    write_gate: Ticket | None,
    store: Store | None,
) -> UpdateJob:
    """The update of a flat buffer, or a part of it, of a block that has a slot.

    `read_param`: the parameters are not in the slot yet. `only`: chunks to move. `write_gate`: what the
    writes wait for. `store`: where what is on storage is, for rules in Python.
    """
    position, segments = part.position, part.segments
    buffer = block.layout.buffers[position]
    plane = block.plane(buffer)
    extents = block.states[position]
    grad_dtype, grad_address, grad_offset = _gradient_source(block, buffer.grad_start)
    if not segments:
        grad_address, grad_offset = plane.data_ptr(), -1  # never read
    return UpdateJob(
        rule=buffer.rule.name,
        callback=chunk_update(buffer, segments, grad_dtype, grad_address, grad_offset, store),
        state_planes=buffer.rule.kinds,
        param_codec=buffer.codec,
        n_elements=buffer.n_elements,
        param_address=plane.data_ptr(),
        param_offset=param_offset(block, position),
        read_param=read_param,
        state_offset=extents.offset,
        state_host_address=0 if extents.host is None else extents.host.data_ptr(),
        host_chunks=extents.host_chunks,
        grad_dtype=grad_dtype,
        grad_address=grad_address,
        grad_offset=grad_offset,
        grad_gate=part.gate,
        tag=-1 if block.is_root else block.index,
        reorders=block.is_root,
        held=block.gives_way,
        segments=segments,
        only=only,
        write_gate=write_gate,
        **other_side(block, position),
    )


# [Note: the turn] Backward ends at block 0, forward begins with the root and block 0: what was handed over last is
# wanted first. The root's update comes last of a step, and (`reorders`) puts those that have not begun in the order of
# use (`tag`), so that forward goes on while the updates of later blocks are still being made. Those of the last blocks
# can give way to others from the start (`held`), where their gradients have host memory of their own to wait in.


def other_side(block: BlockRecord, position: int) -> dict[str, Any]:
    """Where the update of a block with two sides writes ([Note: two sides] in stores/sides.py)."""
    sides = block.sides
    if sides is None:
        return {}
    checksums, expected = sides.addresses(position)
    plane_offset_nbytes = block.layout.buffers[position].plane_offset_nbytes
    return {
        "param_out_offset": sides.param_offsets[sides.other] + plane_offset_nbytes,
        "state_out_offset": sides.state_offsets[position][sides.other],
        "checksums_address": checksums,
        "expected_address": expected,
    }


def _gradient_source(block: BlockRecord, start: int) -> tuple[str, int, int]:
    """Of the gradients from element `start`: dtype, and (address, -1) in host memory or (0, offset) on storage."""
    if block.grad_out is not None:
        part = block.grad_out.plane[start:]
        return str(part.dtype).removeprefix("torch."), part.data_ptr(), -1
    if block.grad_host is not None:
        return "float32", block.grad_host[start:].data_ptr(), -1
    return "float32", 0, block.grad_offset + 4 * start


class RootParts:
    """What an early update has left of the root for the step's last one ([Note: updating the head early])."""

    def __init__(self, root: BlockRecord) -> None:
        self._root = root
        self._rest: list[Segments] = []
        self._early_chunks: list[list[Range]] = []
        """Where the root has two sides, while some of its chunks are on the side that the next step reads and the rest
        is not."""

    @property
    def is_divided(self) -> bool:
        """Whether some chunks are on another side than the rest."""
        return bool(self._early_chunks)

    @property
    def is_due(self) -> bool:
        """Whether an update has left elements or chunks behind."""
        return any(self._rest) or self.is_divided

    def take_early(self, segments_of: list[Segments], chunks: list[list[Range]]) -> list[Segments]:
        """Those parts of the segments that are in `chunks`, to be updated now; keeps the rest."""
        now: list[Segments] = []
        for segments, ranges in zip(segments_of, chunks, strict=True):
            pieces = [(split(start, n, ranges), hyper) for start, n, hyper in segments]
            now.append([(*piece, hyper) for (inside, _), hyper in pieces for piece in inside])
            self._rest.append([(*piece, hyper) for (_, outside), hyper in pieces for piece in outside])
        if self._root.sides is not None:
            self._early_chunks = chunks
        return now

    def add_rest(self, segments_of: list[Segments]) -> None:
        """Add what was kept, in the order of elements."""
        if not self._rest:
            return
        for segments, rest in zip(segments_of, self._rest, strict=True):
            segments += rest
            segments.sort(key=lambda segment: segment[0])
        self._rest = []

    def forget_rest(self) -> None:
        """A failed backward leaves it undone."""
        self._rest = []

    def chunks_left(self, position: int) -> list[Range]:
        """Of a flat buffer, those that the early update has not moved."""
        early = self._early_chunks[position] if self._early_chunks else []
        _, outside = split(0, self._root.layout.buffers[position].n_elements, early)
        return [(start, start + n) for start, n in outside]

    def turned(self) -> None:
        """All chunks are on one side again."""
        self._early_chunks = []

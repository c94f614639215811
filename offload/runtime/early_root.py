"""Which of the root's gradients are complete before the blocks' backward: those of an untied head.

[Note: updating the head early] Between the updates of the last forward and the first gradients of the blocks storage
has nothing to do, and what the root's update takes comes last of a step, when the next forward is waiting for it. An
untied head's gradients are there first. A parameter counts as early once it has, in every backward so far, had its
gradient exactly once and before the first block's backward; a tied one has it at the end, one that blocks use too has
it several times. Only whole chunks are updated early, so that no chunk is read and written twice.
"""

from __future__ import annotations

from collections import Counter

import torch

from offload.errors import UsageError
from offload.model.flat import FlatBuffer
from offload.stores.block_store import BlockRecord

Range = tuple[int, int]
"""Elements of a flat buffer, from the first to before the second."""


class EarlyRoot:
    """What was seen of the root's gradients; says what may be updated when the blocks' backward begins."""

    def __init__(self, root: BlockRecord, chunk_elements: int) -> None:
        self._root = root
        self._chunk_elements = chunk_elements
        self._always_early: set[int] | None = None
        self._n_received: Counter[int] = Counter()
        self._before_blocks: set[int] = set()
        self._blocks_began = False
        self._updated: set[int] = set()

    @property
    def has_updated(self) -> bool:
        """Whether a part of the root was updated in the backward that is going on."""
        return bool(self._updated)

    def begin(self) -> None:
        """A backward begins."""
        self._n_received.clear()
        self._before_blocks.clear()
        self._updated.clear()
        self._blocks_began = False

    def received(self, parameter: torch.nn.Parameter) -> None:
        """`parameter` has a gradient. Raises UsageError when its update was made with an incomplete one."""
        if id(parameter) in self._updated:
            raise UsageError(
                "a parameter of the head received a second gradient in one backward, after its update: what the "
                "model computes with it has changed since its first steps. Use update='deferred'"
            )
        self._n_received[id(parameter)] += 1

    def blocks_begin(self) -> bool:
        """A block's backward begins; True for the first of this backward."""
        first = not self._blocks_began
        if first:
            self._blocks_began = True
            self._before_blocks = {key for key, n in self._n_received.items() if n == 1}
        return first

    def end(self) -> None:
        """The backward has ended without an error: learn from it."""
        if not self._blocks_began:
            return
        early = {key for key in self._before_blocks if self._n_received[key] == 1}
        self._always_early = early if self._always_early is None else self._always_early & early
        self._updated.clear()

    def take(self) -> tuple[set[int], list[list[Range]]]:
        """(id() of parameters whose gradients are final, per flat buffer the chunks that hold no others).

        Empty where there is no such chunk. What is taken counts as updated.
        """
        final = (self._always_early or set()) & self._before_blocks
        chunks = [
            self._chunks_of(buffer, final) if buffer.trainable else [] for buffer in self._root.layout.buffers
        ]
        if not any(chunks):
            return set(), []
        self._updated |= final
        return final, chunks

    def _chunks_of(self, buffer: FlatBuffer, final: set[int]) -> list[Range]:
        ranges: list[Range] = []
        for start in range(0, buffer.n_elements, self._chunk_elements):
            stop = min(start + self._chunk_elements, buffer.n_elements)
            inside = [s for s in buffer.segments if s.start < stop and s.start + s.numel > start]
            if not inside or not all(id(s.parameter) in final for s in inside):
                continue
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        return ranges


def split(start: int, numel: int, ranges: list[Range]) -> tuple[list[Range], list[Range]]:
    """(start, numel) pieces of a segment inside `ranges`, which are sorted and disjoint, and those outside."""
    inside: list[Range] = []
    outside: list[Range] = []
    at, end = start, start + numel
    for first, last in ranges:
        low, high = max(at, first), min(end, last)
        if low >= high:
            continue
        if at < low:
            outside.append((at, low - at))
        inside.append((low, high - low))
        at = high
    if at < end:
        outside.append((at, end - at))
    return inside, outside

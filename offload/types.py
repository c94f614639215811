"""Small shared vocabulary: block states and alignment constants."""

from __future__ import annotations

import enum

from offload.errors import OffloadError

PAGE_NBYTES = 4096
"""Alignment of every extent, slot and staging buffer (O_DIRECT)."""

PLANE_ELEMENTS = 2048
"""Flat buffers are padded to this many elements, so that a 2-byte plane is a whole number of pages."""

SEGMENT_ELEMENTS = 256
"""Each parameter starts at a multiple of this many elements inside its flat buffer; with 8-bit moments so many share a
scale, and no scale may belong to two parameters."""


ROOT_PARTS = 16
"""On a device with memory of its own the root's gradients, update and parameters follow each other in at most so many
parts of each flat buffer: a sixteenth is not overlapped."""


GRAD_PARTS = 4
"""Plans count on so many parts in which a block's gradients leave the only buffer of a device with memory of its own,
as they come (runtime/gradients.py): a layer's large weights."""


class BlockState(enum.Enum):
    """Where a block's parameters are. The legal moves are in `BLOCK_MOVES`."""

    STORED = "stored"
    FETCHING = "fetching"
    RESIDENT = "resident"
    UPDATING = "updating"


BLOCK_MOVES: dict[BlockState, frozenset[BlockState]] = {
    BlockState.STORED: frozenset({BlockState.FETCHING, BlockState.UPDATING}),
    BlockState.FETCHING: frozenset({BlockState.RESIDENT}),
    BlockState.RESIDENT: frozenset({BlockState.UPDATING, BlockState.STORED}),
    BlockState.UPDATING: frozenset({BlockState.RESIDENT}),
}


def checked_move(name: str, old: BlockState, new: BlockState) -> BlockState:
    """Return `new` if a block may go from `old` to `new`, else raise OffloadError naming the block."""
    if new not in BLOCK_MOVES[old]:
        raise OffloadError(f"block {name}: illegal move {old.value} -> {new.value}; please report this")
    return new


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple

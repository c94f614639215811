"""Where each chunk of a block's training state is, in whichever tier: what checkpoints read from and write into.

A chunk is `chunk_elements` elements of a flat buffer: a piece of its parameter plane and, when it is trainable, one
record of optimizer state (`lo` of a split_bf16 buffer, and the planes of its update rule).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from offload.model.flat import FlatBuffer
from offload.stores.block_store import BlockRecord
from offload.stores.sides import Sides
from offload.tiers.storage import Store


@dataclass(frozen=True)
class Piece:
    """`nbytes` of a block, either at `offset` of the store or in `memory` (uint8)."""

    nbytes: int
    offset: int = -1
    memory: torch.Tensor | None = None


@dataclass(frozen=True)
class Chunk:
    """Chunk `index` of a buffer: elements `start` to `start + n`."""

    index: int
    start: int
    n: int


def chunks_of(buffer: FlatBuffer, chunk_elements: int) -> Iterator[Chunk]:
    """All chunks of a flat buffer, in order."""
    for index, start in enumerate(range(0, buffer.n_elements, chunk_elements)):
        yield Chunk(index, start, min(chunk_elements, buffer.n_elements - start))


def param_piece(block: BlockRecord, buffer: FlatBuffer, chunk: Chunk) -> Piece:
    """The chunk's part of the parameter plane: on storage, or in the block's own slot."""
    begin = buffer.plane_offset_nbytes + chunk.start * buffer.dtype.itemsize
    nbytes = chunk.n * buffer.dtype.itemsize
    if block.param_offset >= 0:
        return Piece(nbytes, block.param_offset + begin)
    if block.slot is None:
        raise RuntimeError(f"block {block.name} has neither a slot nor an extent")
    return Piece(nbytes, memory=block.slot.bytes_tensor[begin : begin + nbytes])


def state_piece(block: BlockRecord, position: int, chunk: Chunk) -> Piece:
    """The chunk's record of optimizer state."""
    extents, buffer = block.states[position], block.layout.buffers[position]
    begin, nbytes = buffer.record_begin(chunk.index), buffer.record_nbytes(chunk.n)
    if extents.host is not None and chunk.index < extents.host_chunks:
        return Piece(nbytes, memory=extents.host[begin : begin + nbytes])
    return Piece(nbytes, extents.offset + begin - buffer.record_begin(extents.host_chunks))


def side_pieces(block: BlockRecord, sides: Sides, position: int, chunk: Chunk) -> tuple[Piece, Piece | None]:
    """The chunk's parameters, and its record where it has one, on the committed side of the store."""
    buffer, side = block.layout.buffers[position], sides.committed
    begin = sides.param_offsets[side] + buffer.plane_offset_nbytes + chunk.start * buffer.dtype.itemsize
    param = Piece(chunk.n * buffer.dtype.itemsize, begin)
    if not buffer.trainable:
        return param, None
    offset = sides.state_offsets[position][side] + buffer.record_begin(chunk.index)
    return param, Piece(buffer.record_nbytes(chunk.n), offset)


def fill(piece: Piece, source: torch.Tensor, store: Store | None) -> None:
    """Write page-aligned uint8 `source` (`piece.nbytes` and up to a whole page more) to where `piece` is, and wait."""
    if piece.nbytes == 0:
        return
    if piece.memory is not None:
        piece.memory.copy_(source[: piece.nbytes])
    elif store is not None:
        store.engine.write(source.data_ptr(), source.numel(), piece.offset).wait()

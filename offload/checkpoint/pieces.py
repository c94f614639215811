"""Where a running engine has each chunk of its training state now: what is saved and exported is read from there."""

from __future__ import annotations

from offload.runtime.engine import OffloadEngine
from offload.stores.block_store import BlockRecord
from offload.stores.state_image import Chunk, Piece, param_piece, side_pieces, state_piece


def on_sides(engine: OffloadEngine) -> bool:
    """Whether all of the state is on storage twice, what is used from host memory too."""
    return engine.commits is not None and engine.commits.started


def is_made(engine: OffloadEngine, block: BlockRecord, position: int) -> bool:
    """Whether a buffer's chunks have to be made first, from what a device keeps in its own form."""
    return engine.parts.in_device is not None and block.layout.buffers[position].trainable


def pieces_of(
    engine: OffloadEngine, block: BlockRecord, position: int, chunk: Chunk
) -> tuple[Piece, Piece | None]:
    """Where the chunk's parameters and (of trainable ones) its record are; in memory, where they must be made first."""
    buffer, in_device = block.layout.buffers[position], engine.parts.in_device
    if in_device is not None and is_made(engine, block, position):
        param, record = in_device.chunk_of(position, chunk.start, chunk.n)
        return Piece(param.numel(), memory=param), Piece(record.numel(), memory=record)
    if block.sides is not None and on_sides(engine):
        return side_pieces(block, block.sides, position, chunk)
    state = state_piece(block, position, chunk) if buffer.trainable else None
    return param_piece(block, buffer, chunk), state

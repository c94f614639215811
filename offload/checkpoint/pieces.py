"""Where a running engine has each chunk of its training state now: what is saved and exported is read from there."""

from __future__ import annotations

from offload.runtime.engine import OffloadEngine
from offload.stores.block_store import BlockRecord
from offload.stores.state_image import Chunk, Piece, param_piece, side_pieces, state_piece


def on_sides(engine: OffloadEngine) -> bool:
    """Whether all of the state is on storage twice, what is used from host memory too."""
    return engine.commits is not None and engine.commits.started


def pieces_of(
    engine: OffloadEngine, block: BlockRecord, position: int, chunk: Chunk
) -> tuple[Piece, Piece | None]:
    """Where the chunk's parameters and (of trainable ones) its record are."""
    buffer = block.layout.buffers[position]
    if block.sides is not None and on_sides(engine):
        return side_pieces(block, block.sides, position, chunk)
    state = state_piece(block, position, chunk) if buffer.trainable else None
    return param_piece(block, buffer, chunk), state

"""The fp32 masters of a wrapped model, joined from the two halves in which they are kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from offload.checkpoint.pieces import pieces_of
from offload.runtime.engine import OffloadEngine
from offload.stores.block_store import BlockRecord
from offload.stores.state_image import Piece, chunks_of
from offload.tiers.host import HostArena
from offload.transfer.io_engine import merge_master
from offload.types import PAGE_NBYTES, round_up
from offload.update_rules import LO_NBYTES


def masters_of(engine: OffloadEngine, block: BlockRecord) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, fp32 value) of every trained parameter of `block` that is computed with in bf16; the step must be over.

    Memory used is one flat buffer in fp32, and a chunk.
    """
    for position, buffer in enumerate(block.layout.buffers):
        if not buffer.trainable or buffer.codec != "split_bf16":
            continue
        master = torch.empty(buffer.n_elements, dtype=torch.float32, device="cpu")
        for chunk in chunks_of(buffer, engine.config.chunk_elements):
            param, record = pieces_of(engine, block, position, chunk)
            hi, whole = read_piece(engine, param), read_piece(engine, record)
            lo = whole[: LO_NBYTES["split_bf16"] * chunk.n]
            part = master[chunk.start : chunk.start + chunk.n]
            merge_master(hi.data_ptr(), lo.data_ptr(), part.data_ptr(), chunk.n)
        for segment in buffer.segments:
            yield segment.name, segment.view(master)


def read_piece(engine: OffloadEngine, piece: Piece | None) -> torch.Tensor:
    """The piece's bytes in host memory: its own, where that is where they are."""
    store = engine.parts.resources.store
    if piece is not None and piece.nbytes == 0:  # some update rules keep nothing
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if piece is not None and piece.memory is not None:
        return piece.memory.to("cpu").contiguous()
    if piece is None or store is None:
        raise RuntimeError("a trained buffer has a record, in memory or in a store")
    held = HostArena(round_up(piece.nbytes, PAGE_NBYTES)).bytes_tensor
    store.engine.read(held.data_ptr(), held.numel(), piece.offset).wait()
    return held[: piece.nbytes]

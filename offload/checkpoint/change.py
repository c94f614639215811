"""Change parameters of a wrapped model between two steps, where they live: the exact masters, buffer by buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from offload.checkpoint.masters import read_piece
from offload.checkpoint.pieces import on_sides, pieces_of
from offload.checkpoint.save import engine_of
from offload.errors import ConfigError
from offload.model.flat import FlatBuffer
from offload.runtime.engine import OffloadEngine
from offload.stores.block_store import BlockRecord
from offload.stores.state_image import Chunk, chunks_of, fill, param_piece, state_piece
from offload.tiers.host import HostArena
from offload.transfer.io_engine import merge_master, split_master
from offload.types import PAGE_NBYTES, round_up
from offload.update_rules import LO_NBYTES

Function = Callable[[str, torch.Tensor], object]


def change(model: nn.Module, function: Function) -> None:
    """Call `function(name, values)` for every parameter of a wrapped model; training goes on from what it leaves.

    `values` is in host memory, in the parameter's shape: the fp32 master of a trained parameter, a frozen one in its
    own dtype. Change it in place (`values.clamp_(-1, 1)`, `values.copy_(average[name])`); what is returned is ignored.
    A tied parameter comes once, under its first name, and weights in 8 or 4 bits do not come. Moments and step counts
    stay as they are, as they would in memory. With durability 'step' the changed parameters are committed at once.
    Memory used: one flat buffer (a block's parameters of one dtype) in fp32, and two chunks with their state. Chunks
    that are left as they were are not written.
    Raises UsageError inside a step, ConfigError for Adafactor, whose step sizes come from sizes of parameters that only
    its own updates measure. When `function` raises, some parameters are changed and others are not.
    """
    engine = engine_of(model)
    optimizer = engine.at_step_boundary("change")
    if optimizer.adafactor is not None:
        raise ConfigError(
            "offload.change: Adafactor's step sizes come from the sizes of parameters that its own updates measure; "
            "change parameters before offload.wrap, or train with another optimizer"
        )
    engine.begin_replacing_state()
    try:
        for block in [engine.root, *engine.blocks]:
            for position in range(len(block.layout.buffers)):
                _change_buffer(engine, block, position, function)
    finally:
        engine.end_replacing_state()


def _change_buffer(engine: OffloadEngine, block: BlockRecord, position: int, function: Function) -> None:
    buffer = block.layout.buffers[position]
    chunks = list(chunks_of(buffer, engine.config.chunk_elements))
    dtype = torch.float32 if buffer.trainable else buffer.dtype
    values = torch.empty(buffer.n_elements, dtype=dtype, device="cpu")
    for chunk in chunks:
        param, record = _read(engine, block, position, chunk)
        part = values[chunk.start : chunk.start + chunk.n]
        if buffer.trainable and buffer.codec == "split_bf16":
            merge_master(param.data_ptr(), record.data_ptr(), part.data_ptr(), chunk.n)
        else:
            part.copy_(param.view(dtype))
    if dtype.is_floating_point:
        with torch.no_grad():
            for segment in buffer.segments:
                function(segment.name, segment.view(values))
    for chunk in chunks:
        _write_chunk(engine, block, position, chunk, values[chunk.start : chunk.start + chunk.n])


def _read(
    engine: OffloadEngine, block: BlockRecord, position: int, chunk: Chunk
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk's parameters and its record (empty of a frozen one), uint8 in host memory, to be read only."""
    param, record = pieces_of(engine, block, position, chunk)
    nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
    return read_piece(engine, param), nothing if record is None else read_piece(engine, record)


def _write_chunk(
    engine: OffloadEngine, block: BlockRecord, position: int, chunk: Chunk, values: torch.Tensor
) -> None:
    buffer = block.layout.buffers[position]
    param, record = _read(engine, block, position, chunk)
    new_param, new_record = _encoded(buffer, values, record)
    if not on_sides(engine) and torch.equal(param, new_param) and torch.equal(record, new_record):
        return
    store = engine.parts.resources.store
    fill(param_piece(block, buffer, chunk), _aligned(new_param), store)
    if buffer.trainable:
        fill(state_piece(block, position, chunk), _aligned(new_record), store)


def _encoded(
    buffer: FlatBuffer, values: torch.Tensor, record: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` as parameter plane and record, whose moments are those of `record`."""
    if not buffer.trainable or buffer.codec != "split_bf16":
        return values.view(torch.uint8), record
    hi, new_record = torch.empty(values.numel(), dtype=torch.bfloat16, device="cpu"), record.clone()
    lo = torch.empty(values.numel(), dtype=torch.int16, device="cpu")
    split_master(values.data_ptr(), hi.data_ptr(), lo.data_ptr(), values.numel())
    new_record[: LO_NBYTES["split_bf16"] * values.numel()] = lo.view(torch.uint8)
    return hi.view(torch.uint8), new_record


def _aligned(content: torch.Tensor) -> torch.Tensor:
    """The same bytes in whole pages, as storage is written from."""
    held = HostArena(max(PAGE_NBYTES, round_up(content.numel(), PAGE_NBYTES))).bytes_tensor
    held[: content.numel()].copy_(content)
    return held[: round_up(content.numel(), PAGE_NBYTES)]

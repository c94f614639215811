"""Build the tiers from a placement: arenas, slots, buffers, extents, and the first content of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload.config import Config, host_total_nbytes, parse_budget
from offload.model.blocks import Cut
from offload.model.flat import STATE_NBYTES_PER_ELEMENT, BlockLayout, lay_out
from offload.planner.placement import BlockBytes, Placement, place
from offload.stores.block_store import BlockRecord, GradBuffer, Slot, StateExtents
from offload.tiers.host import HostArena
from offload.tiers.storage import Store
from offload.transfer.io_engine import UpdatePipeline, split_master
from offload.types import PAGE_NBYTES, BlockState, round_up


@dataclass
class Assembly:
    """Everything the runtime runs on."""

    blocks: list[BlockRecord]
    root: BlockRecord
    slots: list[Slot]
    grad_buffers: list[GradBuffer]
    store: Store | None
    pipeline: UpdatePipeline
    arenas: list[HostArena]
    placement: Placement
    device_nbytes: int
    host_nbytes: int


def block_bytes(layout: BlockLayout, chunk_elements: int) -> BlockBytes:
    """What the planner needs to know of one block."""
    chunks: list[int] = []
    for buffer in layout.buffers:
        if buffer.trainable:
            per_element = STATE_NBYTES_PER_ELEMENT[buffer.codec]
            for start in range(0, buffer.n_elements, chunk_elements):
                chunks.append(min(chunk_elements, buffer.n_elements - start) * per_element)
    return BlockBytes(round_up(layout.slot_nbytes, PAGE_NBYTES), tuple(chunks), layout.grad_elements * 4)


def assemble(cut: Cut, config: Config, compute_dtype: torch.dtype | None) -> Assembly:
    """Place `cut` by budget, create the store, and move every parameter to where it belongs, block by block.

    Raises BudgetError before anything is written when it cannot fit.
    """
    layouts = [
        lay_out(name, parameters, compute_dtype)
        for (name, _), parameters in zip(cut.blocks, cut.block_parameters, strict=True)
    ]
    root_layout = lay_out("root", cut.root, compute_dtype)
    total_nbytes = host_total_nbytes()
    device_nbytes = parse_budget(config.device_memory, total_nbytes)
    host_nbytes = parse_budget(config.host_memory, total_nbytes)
    staging_nbytes = UpdatePipeline.buffer_nbytes_required(config.chunk_elements, config.chunk_buffers)
    bytes_of = [block_bytes(layout, config.chunk_elements) for layout in layouts]
    placement = place(
        bytes_of,
        block_bytes(root_layout, config.chunk_elements),
        device_nbytes=device_nbytes,
        host_nbytes=host_nbytes,
        staging_nbytes=staging_nbytes,
        has_storage=bool(config.storage),
        deferred=config.deferred,
        prefetch_blocks=config.prefetch_blocks,
    )
    device_arena = HostArena(placement.device_nbytes + PAGE_NBYTES * (len(layouts) + 8))
    host_arena = HostArena(placement.host_nbytes + PAGE_NBYTES * (4 * len(layouts) + 8))
    store = _make_store(layouts, placement, config)
    if store is not None:
        store.engine.register_buffer(device_arena.address, device_arena.nbytes)
        store.engine.register_buffer(host_arena.address, host_arena.nbytes)
    staging = host_arena.take(staging_nbytes)
    pipeline = UpdatePipeline(
        None if store is None else store.engine,
        config.chunk_elements,
        config.chunk_buffers,
        config.update_threads,
        staging.data_ptr(),
        staging_nbytes,
    )
    slot_nbytes = max((b.slot_nbytes for b in bytes_of), default=0)
    grad_elements = max((layout.grad_elements for layout in layouts), default=0)
    slots = [Slot(device_arena.take(slot_nbytes)) for _ in range(placement.n_slots)]
    grad_buffers = [
        GradBuffer(device_arena.take(grad_elements * 4).view(torch.float32))
        for _ in range(placement.n_grad_buffers)
    ]
    blocks = []
    for index, layout in enumerate(layouts):
        record = _record(index, layout, placement, config, host_arena, store)
        if record.param_offset < 0:
            record.slot = Slot(host_arena.take(layout.slot_nbytes), record)
        if placement.grads_in_host[index]:
            record.grad_host = host_arena.take(layout.grad_elements * 4).view(torch.float32)
        elif store is not None and layout.grad_elements:
            record.grad_offset = store.allocate(layout.grad_elements * 4)
        _import(record, store, slots[0] if slots else None, config.chunk_elements)
        blocks.append(record)
    root = _record(len(layouts), root_layout, placement, config, host_arena, store)
    root.slot = Slot(device_arena.take(root_layout.slot_nbytes), root)
    root.grad_buffer = GradBuffer(device_arena.take(root_layout.grad_elements * 4).view(torch.float32), root)
    _import(root, store, None, config.chunk_elements)
    return Assembly(
        blocks,
        root,
        slots,
        grad_buffers,
        store,
        pipeline,
        [device_arena, host_arena],
        placement,
        device_nbytes,
        host_nbytes,
    )


def _make_store(layouts: list[BlockLayout], placement: Placement, config: Config) -> Store | None:
    if not config.storage:
        return None
    grads = sum(
        round_up(layout.grad_elements * 4, PAGE_NBYTES)
        for layout, in_host in zip(layouts, placement.grads_in_host, strict=True)
        if not in_host
    )
    return Store(
        config.storage,
        placement.storage_nbytes + grads + PAGE_NBYTES * 8 * (len(layouts) + 2),
        stripe_nbytes=config.stripe_nbytes,
        backend=config.backend,
        direct=config.direct_io,
        block_nbytes=config.io_block_nbytes,
        queue_depth=config.io_queue_depth,
        keep=config.keep_store,
    )


def _record(
    index: int,
    layout: BlockLayout,
    placement: Placement,
    config: Config,
    arena: HostArena,
    store: Store | None,
) -> BlockRecord:
    is_root = index == len(placement.params_in_host)
    param_offset = -1
    if not is_root and not placement.params_in_host[index] and store is not None:
        param_offset = store.allocate(layout.slot_nbytes)
    states: dict[int, StateExtents] = {}
    left = placement.host_chunks[index]
    for position, buffer in enumerate(layout.buffers):
        if not buffer.trainable:
            continue
        n_chunks = -(-buffer.n_elements // config.chunk_elements)
        host_chunks = min(left, n_chunks)
        left -= host_chunks
        per_element = STATE_NBYTES_PER_ELEMENT[buffer.codec]
        host_nbytes = min(buffer.n_elements, host_chunks * config.chunk_elements) * per_element
        stored_nbytes = buffer.state_nbytes - host_nbytes
        offset = store.allocate(stored_nbytes) if stored_nbytes and store is not None else -1
        states[position] = StateExtents(arena.take(host_nbytes) if host_nbytes else None, host_chunks, offset)
    return BlockRecord(index, layout, is_root, param_offset, states)


def _import(record: BlockRecord, store: Store | None, scratch: Slot | None, chunk_elements: int) -> None:
    """Fill the block's planes and states from the parameters it still holds, then point the parameters at them."""
    slot = record.slot or scratch
    if slot is None:
        return
    for position, buffer in enumerate(record.layout.buffers):
        plane = record.plane(buffer, slot)
        plane.view(torch.uint8).zero_()
        split = buffer.trainable and buffer.codec == "split_bf16"
        lo = torch.zeros(buffer.n_elements, dtype=torch.int16) if split else None
        for segment in buffer.segments:
            source = segment.parameter.data
            if lo is not None and source.dtype == torch.float32:
                flat = source.contiguous().view(-1)
                end = segment.start + segment.numel
                split_master(
                    flat.data_ptr(),
                    plane[segment.start : end].data_ptr(),
                    lo[segment.start : end].data_ptr(),
                    segment.numel,
                )
            else:
                segment.view(plane).copy_(source)
            segment.parameter.data = torch.empty(0, dtype=buffer.dtype)
        if lo is not None and bool(lo.any()):
            _import_lo(lo, record.states[position], store, chunk_elements)
    if record.slot is None and store is not None:
        store.engine.write(
            slot.bytes_tensor.data_ptr(), record.layout.slot_nbytes, record.param_offset
        ).wait()
        record.unbind()
    else:
        record.state = BlockState.RESIDENT
        record.bind()


def _import_lo(lo: torch.Tensor, extents: StateExtents, store: Store | None, chunk_elements: int) -> None:
    """Write the low halves of fp32 masters into their chunk records; moments stay zero."""
    for chunk, start in enumerate(range(0, lo.numel(), chunk_elements)):
        part = lo[start : start + chunk_elements].view(torch.uint8)
        if extents.host is not None and chunk < extents.host_chunks:
            extents.host[start * 10 : start * 10 + part.numel()] = part
        elif store is not None:
            staging = HostArena(part.numel())
            staging.bytes_tensor[: part.numel()] = part
            offset = extents.offset + (start - extents.host_chunks * chunk_elements) * 10
            store.engine.write(staging.address, part.numel(), offset).wait()

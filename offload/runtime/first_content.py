"""The first content of a block's planes and records: what its parameters hold when they are handed over."""

from __future__ import annotations

import torch

from offload.model.flat import FlatBuffer
from offload.stores.block_store import BlockRecord, Slot, StateExtents
from offload.tiers.device import DeviceTier
from offload.tiers.host import HostArena
from offload.tiers.storage import Store
from offload.transfer.io_engine import split_master
from offload.types import BlockState


def import_into(
    record: BlockRecord, store: Store | None, scratch: Slot | None, chunk_elements: int, device: DeviceTier
) -> None:
    """Fill the block's planes and states from the parameters it still holds, then point the parameters at them."""
    slot = record.slot or scratch
    if slot is None:
        return
    for position, buffer in enumerate(record.layout.buffers):
        plane = record.plane(buffer, slot.bytes_tensor)
        plane.view(torch.uint8).zero_()
        split = buffer.trainable and buffer.codec == "split_bf16"
        lo = torch.zeros(buffer.n_elements, dtype=torch.int16, device="cpu") if split else None
        for segment in buffer.segments:
            source = segment.parameter.data
            if lo is not None and source.dtype == torch.float32:
                flat = source.contiguous().view(-1).cpu()
                part = slice(segment.start, segment.start + segment.numel)
                hi = (
                    plane[part] if plane.device.type == "cpu" else torch.empty_like(plane[part], device="cpu")
                )
                split_master(flat.data_ptr(), hi.data_ptr(), lo[part].data_ptr(), segment.numel)
                plane[part].copy_(hi)
            else:
                segment.view(plane).copy_(source)
            segment.parameter.data = torch.empty(0, dtype=buffer.dtype, device="cpu")
        if lo is not None and bool(lo.any()):
            _import_lo(lo, buffer, record.states[position], store, chunk_elements)
    if record.slot is None and store is not None:
        address, nbytes = slot.bytes_tensor.data_ptr(), record.layout.slot_nbytes
        store.engine.write(address, nbytes, record.param_offset).wait()
    else:
        record.state = BlockState.RESIDENT
    if record.on_device or (record.slot is not None and device.shares_host):
        record.bind()
    else:
        record.unbind(device.torch_device)


def _import_lo(
    lo: torch.Tensor, buffer: FlatBuffer, extents: StateExtents, store: Store | None, chunk_elements: int
) -> None:
    """Write the low halves of fp32 masters into their chunk records; moments stay zero."""
    for chunk, start in enumerate(range(0, lo.numel(), chunk_elements)):
        part = lo[start : start + chunk_elements].view(torch.uint8)
        if extents.host is not None and chunk < extents.host_chunks:
            begin = buffer.record_begin(chunk)
            extents.host[begin : begin + part.numel()] = part
        elif store is not None:
            staging = HostArena(part.numel())
            staging.bytes_tensor[: part.numel()] = part
            offset = extents.offset + buffer.record_begin(chunk - extents.host_chunks)
            store.engine.write(staging.address, part.numel(), offset).wait()

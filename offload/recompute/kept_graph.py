"""Graphs that are kept from forward to backward though their parameters' memory moves."""

from __future__ import annotations

from typing import Any

import torch

from offload.errors import UsageError
from offload.stores.block_store import BlockRecord


def saved_by_reference(block: BlockRecord) -> torch.autograd.graph.saved_tensors_hooks:
    """Hooks that save tensors lying in the block's slot as (dtype, shape, strides, byte offset), others as they are."""

    def pack(tensor: torch.Tensor) -> Any:
        held = block.compute_bytes
        if tensor.layout is not torch.strided:  # it has values and indices, and no memory of its own
            return tensor
        if held is None or tensor.untyped_storage().data_ptr() != held.untyped_storage().data_ptr():
            return tensor
        first = held.data_ptr()
        if not first <= tensor.data_ptr() < first + held.numel():
            return tensor
        offset_nbytes = tensor.data_ptr() - first
        return (tensor.dtype, tensor.shape, tensor.stride(), offset_nbytes)

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        dtype, shape, stride, offset_nbytes = saved
        held = block.compute_bytes
        if held is None:
            raise UsageError(
                f"block {block.name} is needed for backward but has been evicted; please report this"
            )
        plane = held[offset_nbytes:]
        whole = plane[: plane.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole.as_strided(shape, stride, whole.storage_offset())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

"""What of a model is in device memory all the time, beside parameters: its buffers, and scales of quantized weights.

It is computed with everywhere, and a small part of a model: masks, rotary frequencies, statistics. On a device with
memory of its own it counts against the budget, each storage once, and is moved there once, so that tensors that share
memory in the host's still do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from offload.model.quantized import scales_of


def _stays(model: nn.Module) -> list[torch.Tensor]:
    """Each tensor once."""
    buffers = (buffer for module in model.modules() for buffer in module._buffers.values())
    found = [buffer for buffer in buffers if buffer is not None]
    found += [getattr(holder, name) for holder, name in scales_of(model)]
    return list({id(tensor): tensor for tensor in found}.values())


def _by_storage(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors that lie in the same memory together; those without memory that is like a range of bytes, alone."""
    groups: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        groups.setdefault(tensor.untyped_storage()._cdata if plain else -id(tensor), []).append(tensor)
    return list(groups.values())


def _whole_storage_nbytes(group: list[torch.Tensor]) -> int | None:
    """Bytes of the memory that several tensors, or one seen several times at once, share; None where each is better
    taken by itself."""
    own_nbytes = sum(t.numel() * t.element_size() for t in group)
    if group[0].layout is not torch.strided:
        return None
    whole_nbytes = group[0].untyped_storage().nbytes()
    return whole_nbytes if whole_nbytes < own_nbytes else None


def stays_nbytes(model: nn.Module) -> int:
    """Bytes of device memory that it will take."""
    total = 0
    for group in _by_storage(_stays(model)):
        whole_nbytes = _whole_storage_nbytes(group)
        total += sum(t.numel() * t.element_size() for t in group) if whole_nbytes is None else whole_nbytes
    return total


def move_what_stays(model: nn.Module, device: torch.device) -> None:
    """Put it on `device`."""
    moved: dict[int, torch.Tensor] = {}
    for group in _by_storage(t for t in _stays(model) if t.device != device):
        if _whole_storage_nbytes(group) is None:
            moved |= {id(tensor): tensor.to(device) for tensor in group}
            continue
        storage = torch.empty(0, dtype=torch.uint8, device=group[0].device).set_(group[0].untyped_storage())
        there = storage.to(device).untyped_storage()
        for tensor in group:
            place = (tensor.storage_offset(), tensor.shape, tensor.stride())
            moved[id(tensor)] = torch.empty(0, dtype=tensor.dtype, device=device).set_(there, *place)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved.get(id(buffer), buffer)
    for holder, name in scales_of(model):
        tensor = getattr(holder, name)
        setattr(holder, name, moved.get(id(tensor), tensor))

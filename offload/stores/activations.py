"""Activation checkpoints (block inputs): kept in memory, or written to storage and read back before backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload.telemetry import Stalls
from offload.tiers.host import HostArena
from offload.tiers.storage import Store
from offload.types import PAGE_NBYTES, round_up


@dataclass
class SwappedOut:
    """A tensor on storage: `nbytes` at `offset`."""

    offset: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class ActivationStore:
    """Swaps block inputs out to storage through a fixed ring of staging buffers.

    Buffers and extents are made for the first tensor's size; smaller tensors reuse them, a larger one makes the
    ring and the extents grow once.
    """

    def __init__(self, store: Store, stalls: Stalls, staging_buffers: int = 2) -> None:
        self._store = store
        self._stalls = stalls
        self._n_buffers = staging_buffers
        self._buffers: deque[tuple[torch.Tensor, Callable[[], None]]] = deque()
        self._extent_nbytes = 0
        self._free_extents: list[int] = []
        self._arena: HostArena | None = None

    def _resize(self, nbytes: int) -> None:
        for _, wait in self._buffers:
            wait()
        self._extent_nbytes = nbytes
        self._arena = HostArena(nbytes * self._n_buffers)
        self._buffers = deque((self._arena.take(nbytes), lambda: None) for _ in range(self._n_buffers))
        self._free_extents.clear()

    def _buffer(self) -> torch.Tensor:
        buffer, wait = self._buffers.popleft()
        with self._stalls.waiting("activation"):
            wait()
        return buffer

    def swap_out(self, tensor: torch.Tensor) -> SwappedOut:
        """Start writing a copy of `tensor`; the caller may drop it at once."""
        nbytes = round_up(max(1, tensor.numel() * tensor.element_size()), PAGE_NBYTES)
        if nbytes > self._extent_nbytes:
            self._resize(nbytes)
        if not self._free_extents:
            self._store.grow(self._extent_nbytes)
            self._free_extents.append(self._store.allocate(self._extent_nbytes))
        offset = self._free_extents.pop()
        buffer = self._buffer()
        flat = buffer[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
        flat.view(tensor.shape).copy_(tensor)
        ticket = self._store.engine.write(buffer.data_ptr(), nbytes, offset)
        self._buffers.append((buffer, ticket.wait))
        return SwappedOut(offset, nbytes, tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)

    def swap_in(self, handle: SwappedOut) -> torch.Tensor:
        """The tensor again. Waits for its write, if that is still in flight, and for the read."""
        for _, wait in self._buffers:
            wait()  # a read may not overtake the write of the same extent
        buffer = self._buffer()
        ticket = self._store.engine.read(buffer.data_ptr(), handle.nbytes, handle.offset, urgent=True)
        with self._stalls.waiting("activation"):
            ticket.wait()
        nbytes = handle.shape.numel() * handle.dtype.itemsize
        tensor = buffer[:nbytes].view(handle.dtype).view(handle.shape).to(handle.device, copy=True)
        self._buffers.append((buffer, lambda: None))
        if handle.nbytes <= self._extent_nbytes:
            self._free_extents.append(handle.offset)
        return tensor.requires_grad_(handle.requires_grad)

"""All gradients of a parameter, for an update that must look at every one before it changes the first element."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch

from offload.tiers.host import HostArena
from offload.tiers.storage import Store
from offload.types import PAGE_NBYTES, round_up


class WholeGradients(Protocol):
    """Of a flat buffer."""

    def part(self, start: int, n: int) -> torch.Tensor:
        """A copy, fp32 and not scaled, of `n` gradients from element `start` of the buffer on; for one thread at a
        time."""


def tensor_at(address: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over memory that somebody else owns."""
    held = (ctypes.c_byte * (n * dtype.itemsize)).from_address(address)
    return torch.frombuffer(held, dtype=dtype)


class HeldGradients:
    """In host memory, at `address`."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self._dtype = address, dtype

    def part(self, start: int, n: int) -> torch.Tensor:
        """As in WholeGradients."""
        held = tensor_at(self._address + start * self._dtype.itemsize, n, self._dtype)
        return held.to(torch.float32, copy=True)


class StoredGradients:
    """On storage, fp32 from byte `offset` of the store on; every look at them reads them."""

    def __init__(self, store: Store, offset: int) -> None:
        self._store, self._offset = store, offset
        self._arena: HostArena | None = None

    def part(self, start: int, n: int) -> torch.Tensor:
        """As in WholeGradients. Raises OSError when storage fails."""
        begin = self._offset + 4 * start
        first = begin // PAGE_NBYTES * PAGE_NBYTES
        nbytes = round_up(begin + 4 * n - first, PAGE_NBYTES)
        if self._arena is None or self._arena.nbytes < nbytes:
            self._arena = HostArena(nbytes)
        self._store.engine.read(self._arena.address, nbytes, first, urgent=True).wait()
        return self._arena.bytes_tensor[begin - first :][: 4 * n].view(torch.float32).clone()

"""The host arena: one page-aligned region of fixed size, handed out in page-aligned pieces, for good or on lease."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from offload._C import Arena
from offload.errors import BudgetError
from offload.types import PAGE_NBYTES, round_up


class HostArena:
    """`nbytes` of page-aligned DRAM as one uint8 tensor, cut once at set-up; a steady step allocates nothing."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = round_up(max(nbytes, PAGE_NBYTES), PAGE_NBYTES)
        self._arena = Arena(self.nbytes)
        self.bytes_tensor = torch.frombuffer(memoryview(self._arena), dtype=torch.uint8)
        self._used_nbytes = 0

    @property
    def address(self) -> int:
        """First byte."""
        return self.bytes_tensor.data_ptr()

    def take(self, nbytes: int) -> torch.Tensor:
        """A page-aligned uint8 tensor of exactly `nbytes`. Raises BudgetError when the arena is used up."""
        start = self._used_nbytes
        self._used_nbytes += round_up(nbytes, PAGE_NBYTES)
        if self._used_nbytes > self.nbytes:
            raise BudgetError(f"arena of {self.nbytes} bytes is used up; {self._used_nbytes} wanted")
        return self.bytes_tensor[start : start + nbytes]


class Lease:
    """A borrowed piece of host memory. Asynchronous work hands it on: `release_after(wait)`."""

    def __init__(self, bytes_tensor: torch.Tensor, give_back: Callable[[Lease], None]) -> None:
        self.bytes_tensor = bytes_tensor
        self._give_back = give_back
        self._wait: Callable[[], None] | None = None

    def release_after(self, wait: Callable[[], None]) -> None:
        """Give it back now; the next borrower calls `wait` before using it."""
        self._wait = wait
        self._give_back(self)

    def ready(self) -> Lease:
        """Wait for what the last borrower left running."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()
        return self


class LeasePool:
    """A region cut into pieces of `piece_nbytes`, lent in the order in which they come back."""

    def __init__(self, region: torch.Tensor, piece_nbytes: int) -> None:
        self.piece_nbytes = piece_nbytes
        starts = range(0, region.numel() - piece_nbytes + 1, piece_nbytes)
        self._free = deque(Lease(region[s : s + piece_nbytes], self._take_back) for s in starts)

    def _take_back(self, lease: Lease) -> None:
        self._free.append(lease)

    @property
    def all_leased(self) -> bool:
        """Whether the next `lease` would fail."""
        return not self._free

    def lease(self) -> Lease:
        """The piece that came back first; waits until it may be used. Raises BudgetError when all are lent."""
        if not self._free:
            raise BudgetError(f"all pieces of {self.piece_nbytes} bytes are lent")
        return self._free.popleft().ready()

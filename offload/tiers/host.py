"""The host arena: one page-aligned region of fixed size, handed out in page-aligned pieces, for good or on lease.

[Note: forks] A process that is forked from the run's (a DataLoader's worker) finds zeros in an arena. Memory that is
registered for transfers would otherwise be copied whole for every child. What a child may compute with is kept for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

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

    @property
    def left_nbytes(self) -> int:
        """What may still be taken."""
        return self.nbytes - self._used_nbytes

    def take(self, nbytes: int) -> torch.Tensor:
        """A page-aligned uint8 tensor of exactly `nbytes`. Raises BudgetError when the arena is used up."""
        start = self._used_nbytes
        self._used_nbytes += round_up(nbytes, PAGE_NBYTES)
        if self._used_nbytes > self.nbytes:
            raise BudgetError(f"arena of {self.nbytes} bytes is used up; {self._used_nbytes} wanted")
        return self.bytes_tensor[start : start + nbytes]

    def keep_on_fork(self, piece: torch.Tensor) -> None:
        """A forked process is to have what is in a piece that was taken. See [Note: forks]."""
        if piece.nbytes:
            self._arena.keep_on_fork(piece.data_ptr() - self.address, round_up(piece.nbytes, PAGE_NBYTES))


@dataclass
class Spare:
    """Memory that the budget has left. All who take of it count it in the same one."""

    nbytes: int


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


class LeaseRing:
    """A region lent piece after piece, round and round; every piece as long as it is asked for.

    A piece follows the one lent before it, so what it covers was lent longest ago. At most half of the region is lent
    at once to one borrower (`piece_nbytes_max`): one half is filled while the other is emptied.
    """

    def __init__(self, region: torch.Tensor) -> None:
        self._region = region
        self.piece_nbytes_max = region.numel() // 2 // PAGE_NBYTES * PAGE_NBYTES
        self._lent: deque[tuple[int, int, Lease]] = deque()
        """(first byte, byte after the last, lease) in the order of lending; until its place is wanted again."""
        self._given_back: set[Lease] = set()
        self._next = 0

    def _covered(self, nbytes: int) -> tuple[int, int]:
        """(first byte of the next piece, how many of the oldest pieces it covers or leaves behind at the end)."""
        wraps = self._next + nbytes > self._region.numel()
        start = 0 if wraps else self._next
        n = 0
        for first, last, _ in self._lent:
            if not (first < start + nbytes and start < last) and not (wraps and first >= self._next):
                break
            n += 1
        return start, n

    def has_room(self, nbytes: int) -> bool:
        """Whether `lease(nbytes)` would succeed, if only after waiting for a last borrower's work."""
        wanted = round_up(nbytes, PAGE_NBYTES)
        _, n = self._covered(wanted)
        return wanted <= self._region.numel() and all(self._lent[i][2] in self._given_back for i in range(n))

    def lease(self, nbytes: int) -> Lease:
        """`nbytes` in whole pages; waits until they may be used. Raises BudgetError when others hold them."""
        if not self.has_room(nbytes):
            raise BudgetError(
                f"{nbytes} of {self._region.numel()} bytes of staging are wanted and lent to others"
            )
        wanted = round_up(nbytes, PAGE_NBYTES)
        start, n = self._covered(wanted)
        for _ in range(n):
            _, _, oldest = self._lent.popleft()
            self._given_back.discard(oldest)
            oldest.ready()
        self._next = start + wanted
        lease = Lease(self._region[start : self._next], self._given_back.add)
        self._lent.append((start, self._next, lease))
        return lease

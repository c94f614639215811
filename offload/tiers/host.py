"""The host arena: one page-aligned region of fixed size, handed out in page-aligned pieces."""

from __future__ import annotations

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

"""Bytes of the training state on their way into a checkpoint's file: shared with the store, or streamed in pieces.

[Note: sharing extents] XFS and Btrfs can let two files have the same extents until one of them is written to. Where the
store is one file beside the checkpoint, that takes no time and no room, and nothing is copied but what lives in host
memory. (`copy_file_range` would do no more there, and on ext4 it copies through the page cache.)
"""

from __future__ import annotations

import contextlib
import fcntl
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from offload.stores.block_store import BlockRecord
from offload.stores.state_image import Piece
from offload.transfer.io_engine import Engine, Ticket, crc32c
from offload.types import PAGE_NBYTES, round_up

FICLONERANGE = 0x4020940D
"""linux/fs.h: _IOW(0x94, 13, struct file_clone_range)."""


@dataclass(frozen=True)
class Item:
    """One chunk's parameters or its record: where they are, and where they go in the checkpoint's file."""

    block: BlockRecord
    piece: Piece
    offset: int
    checksums: Any
    """Whose element `index` is to be their CRC32C."""
    index: int
    shared: bool = False
    """The file has them already; they are read from there to be summed."""
    may_be_written: bool = False
    """From outside, between two steps (`runtime/written_parameters.py`)."""


def shared_ranges(items: list[Item]) -> Iterator[tuple[int, int, int]]:
    """(offset in the store, offset in the file, bytes) of what lies on storage; neighbours in both are one range."""
    start = target = nbytes = 0
    for item in sorted((i for i in items if i.piece.memory is None), key=lambda i: i.offset):
        if nbytes and item.piece.offset == start + nbytes and item.offset == target + nbytes:
            nbytes += item.piece.nbytes
            continue
        if nbytes:
            yield start, target, nbytes
        start, target, nbytes = item.piece.offset, item.offset, item.piece.nbytes
    if nbytes:
        yield start, target, nbytes


def share(items: list[Item], source: int, target: int) -> list[Item]:
    """Let the file `target` have the extents of `source` (descriptors); the items that stay to be read or copied.

    All of them as they were where the file system cannot. See [Note: sharing extents].
    """
    try:
        for start, to, nbytes in shared_ranges(items):
            fcntl.ioctl(target, FICLONERANGE, struct.pack("=qQQQ", source, start, nbytes, to))
    except OSError:
        return items
    return [
        item if item.piece.memory is not None else replace(item, piece=Piece(item.piece.nbytes), shared=True)
        for item in items
    ]


class StreamingCopy:
    """Moves pieces into a file through a ring of staging buffers; reads, checksums and writes overlap."""

    def __init__(self, source: Engine | None, target: Engine, ring: list[torch.Tensor]) -> None:
        self._source, self._target = source, target
        self._free = list(ring)
        self._depth = max(1, len(ring) // 2)
        self._reading: deque[tuple[Ticket | None, torch.Tensor, Item]] = deque()
        self._writing: deque[tuple[Ticket, torch.Tensor]] = deque()
        self.source_read_nbytes = 0
        """Read from the store so far."""

    def add(self, item: Item) -> None:
        """Start moving it, or only reading and summing it where the file has it already."""
        while not self._free:
            self._hand_on() if self._reading else self._end_write()
        staging = self._free.pop()
        ticket = None
        nbytes = item.piece.nbytes
        if item.piece.memory is not None:
            staging[:nbytes].copy_(item.piece.memory)
        elif item.shared:
            ticket = self._target.read(staging.data_ptr(), round_up(nbytes, PAGE_NBYTES), item.offset)
        elif self._source is not None:
            whole_nbytes = round_up(nbytes, PAGE_NBYTES)
            ticket = self._source.read(staging.data_ptr(), whole_nbytes, item.piece.offset)
            self.source_read_nbytes += whole_nbytes
        self._reading.append((ticket, staging, item))
        if len(self._reading) >= self._depth:
            self._hand_on()

    def _hand_on(self) -> None:
        ticket, staging, item = self._reading[0]
        if ticket is not None:
            ticket.wait()
        self._reading.popleft()
        nbytes = item.piece.nbytes
        item.checksums[item.index] = crc32c(staging.data_ptr(), nbytes)
        if item.shared:
            self._free.append(staging)
            return
        whole_nbytes = round_up(nbytes, PAGE_NBYTES)
        staging[nbytes:whole_nbytes].zero_()
        self._writing.append((self._target.write(staging.data_ptr(), whole_nbytes, item.offset), staging))

    def _end_write(self) -> None:
        ticket, staging = self._writing[0]
        ticket.wait()
        self._writing.popleft()
        self._free.append(staging)

    def abandon(self) -> None:
        """Wait for what is in flight, whatever becomes of it: the staging is others' afterwards."""
        tickets = [*(ticket for ticket, _, _ in self._reading), *(ticket for ticket, _ in self._writing)]
        for ticket in tickets:
            with contextlib.suppress(OSError):
                if ticket is not None:
                    ticket.wait()

    def finish_reads(self) -> None:
        """Wait until everything that was added has left the place where it was."""
        while self._reading:
            self._hand_on()

    def finish(self) -> None:
        """Wait for everything that was added."""
        self.finish_reads()
        while self._writing:
            self._end_write()

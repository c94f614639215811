"""Two sets of extents for a block, so that one is whole whatever happens while the other is being written.

[Note: two sides] An update reads one side and writes the other. The last committed step is on the sides that its commit
record names; the update of the next step overwrites the sides that are older than it. So the record of a step has to be
on the drives before the first update of the next step writes (`runtime/commits.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offload._C import crc32c
from offload.errors import ConfigError
from offload.model.flat import BlockLayout, FlatBuffer
from offload.stores.record_size import record_room_nbytes
from offload.tiers.manifest import MANIFEST_NBYTES_MAX
from offload.types import PAGE_NBYTES, round_up


@dataclass
class Sides:
    """Offsets of side 0 and 1: of the parameter planes, and of each trainable buffer's records, by position.

    `checksums[position][side]` is uint32 of shape (chunks, 2): CRC32C of each chunk's parameters and of its record.
    """

    param_offsets: tuple[int, int]
    state_offsets: dict[int, tuple[int, int]]
    checksums: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
    chunk_elements: int
    current: int = 0
    """What is read next."""
    generation: int = 0
    """Updates that have been submitted."""
    committed: int = 0
    committed_generation: int = 0
    host_chunk_nbytes: dict[int, int] = field(default_factory=dict)
    """Bytes of a buffer's records that live in host memory, by position."""
    verifies: bool = False
    """Whether the checksums of the current side are known."""

    @property
    def other(self) -> int:
        """The side that the next update writes."""
        return 1 - self.current

    def addresses(self, position: int) -> tuple[int, int]:
        """Where the next update of a buffer puts its checksums, and where those of what it reads are (0: unknown)."""
        of = self.checksums[position]
        return of[self.other].ctypes.data, of[self.current].ctypes.data if self.verifies else 0

    def wrong_chunk(self, position: int, buffer: FlatBuffer, address: int) -> int | None:
        """The first chunk of a buffer's parameter plane, just read to `address`, that is not what was written."""
        chunk_nbytes = self.chunk_elements * buffer.dtype.itemsize
        plane_nbytes = buffer.n_elements * buffer.dtype.itemsize
        expected = self.checksums[position][self.current][:, 0]
        for index, start in enumerate(range(0, plane_nbytes, chunk_nbytes)):
            if crc32c(address + start, min(chunk_nbytes, plane_nbytes - start)) != expected[index]:
                return index
        return None

    def commit(self, side: int, generation: int) -> None:
        """A side has become durable, with what so many updates made of it."""
        self.committed, self.committed_generation = side, generation

    def roll_back(self) -> bool:
        """Return to the committed side. Whether the current one was another."""
        changed = self.current != self.committed
        self.current, self.generation = self.committed, self.committed_generation
        return changed


def checksum_tables(layout: BlockLayout, chunk_elements: int) -> dict[int, tuple[Any, Any]]:
    """Room for the checksums of every buffer, on both sides."""
    tables = {}
    for position, buffer in enumerate(layout.buffers):
        n_chunks = -(-buffer.n_elements // chunk_elements)
        tables[position] = (np.zeros((n_chunks, 2), np.uint32), np.zeros((n_chunks, 2), np.uint32))
    return tables


def record_nbytes(layouts: list[BlockLayout], chunk_elements: int) -> int:
    """Room for one commit record. Raises ConfigError when that is more than a record may have."""
    buffers = [buffer for layout in layouts for buffer in layout.buffers]
    chunks = sum(-(-buffer.n_elements // chunk_elements) for buffer in buffers)
    parameters = sum(len(buffer.segments) for buffer in buffers)
    statistics_nbytes = sum(
        buffer.rule.encoded_statistics_nbytes(segment.shape)
        for buffer in buffers
        for segment in buffer.segments
        if buffer.trainable
    )
    nbytes = record_room_nbytes(len(buffers), chunks, parameters, statistics_nbytes)
    if nbytes > MANIFEST_NBYTES_MAX:
        raise ConfigError(
            f"durability='step': the record of each step would take {nbytes} bytes, and {MANIFEST_NBYTES_MAX} is the "
            "most: use durability='checkpoint'"
        )
    return nbytes


def durable_nbytes(layouts: list[BlockLayout], chunk_elements: int) -> int:
    """Storage of a run whose every step is durable: all state twice, wherever it is used from, and two records."""
    once = sum(
        round_up(layout.slot_nbytes, PAGE_NBYTES)
        + sum(round_up(buffer.state_nbytes, PAGE_NBYTES) for buffer in layout.buffers)
        for layout in layouts
    )
    return 2 * once + 2 * record_nbytes(layouts, chunk_elements)

"""Read what a manifest describes: every chunk is checked against its CRC32C before anyone uses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from offload.checkpoint.directory import EXTENTS_FILE, MANIFEST_FILE
from offload.checkpoint.save import KIND
from offload.errors import CheckpointError, CorruptError
from offload.tiers.encoding import dtype_named
from offload.tiers.host import HostArena
from offload.tiers.manifest import (
    CODECS,
    Buffer,
    Extent,
    Manifest,
    check,
    read_bounded,
    unframe,
    validated,
)
from offload.transfer.io_engine import Engine, Ticket, crc32c
from offload.types import PAGE_NBYTES, round_up


def read_manifest(path: str) -> Manifest:
    """The manifest of the checkpoint at `path`, checked. Raises CheckpointError, CorruptError."""
    where = os.path.join(path, MANIFEST_FILE)
    manifest = check(validated(Manifest, unframe(KIND, read_bounded(where), where), where), where)
    if manifest.files != [EXTENTS_FILE]:
        raise CheckpointError(f"{where}: names the files {manifest.files}, {EXTENTS_FILE} was expected")
    return manifest


class ChunkReader:
    """Chunks of a manifest's buffers, verified, in any order; in the order of the file it reads one ahead.

    Uses two page-aligned pieces of host memory, each as large as a chunk with all its state.
    """

    def __init__(self, manifest: Manifest, paths: list[str], **engine_options: Any) -> None:
        self.manifest = manifest
        self._paths = paths
        self._check_files()
        itemsize_max = max(
            (dtype_named(b.dtype).itemsize for block in manifest.blocks for b in block.buffers), default=2
        )
        longest = max((b.n_elements for block in manifest.blocks for b in block.buffers), default=0)
        n = min(manifest.chunk_elements, longest) or PAGE_NBYTES
        self._param_nbytes = round_up(n * itemsize_max, PAGE_NBYTES)
        self._rule = manifest.rule.rule
        record_nbytes = max(self._rule.record_nbytes(codec, n) for codec in CODECS.values())
        piece_nbytes = self._param_nbytes + round_up(record_nbytes, PAGE_NBYTES)
        self._arenas = [HostArena(piece_nbytes), HostArena(piece_nbytes)]
        self._held: list[tuple[int, int] | None] = [None, None]
        self._tickets: list[list[Ticket]] = [[], []]
        self._next = 0
        try:
            self._engine = Engine(paths, stripe_nbytes=manifest.stripe_nbytes, **engine_options)
        except OSError as error:
            raise CheckpointError(f"{paths[0]}: cannot be read: {error}") from error

    def _check_files(self) -> None:
        n_files = len(self._paths)
        stripes = -(-self.manifest.nbytes // self.manifest.stripe_nbytes)
        for path in self._paths:
            try:
                found_nbytes = os.stat(path).st_size
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
            least = self.manifest.nbytes if n_files == 1 else stripes // n_files * self.manifest.stripe_nbytes
            if found_nbytes < least:
                raise CorruptError(
                    f"{path}: has {found_nbytes} bytes, {least} at least were written: it has been cut short; "
                    "resume from another checkpoint"
                )

    def close(self) -> None:
        """Finish reads in flight and close the files."""
        self._engine.close()

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def elements(self, buffer: Buffer, index: int) -> int:
        """Elements of chunk `index`."""
        size = self.manifest.chunk_elements
        return min(size, buffer.n_elements - index * size)

    def _ranges(self, buffer: Buffer, index: int) -> Iterator[tuple[Extent, int, int, int]]:
        """(extent, offset, bytes, place in the piece) of the chunk's plane and record."""
        n, start = self.elements(buffer, index), index * self.manifest.chunk_elements
        itemsize = dtype_named(buffer.dtype).itemsize
        yield buffer.param, buffer.param.offset + start * itemsize, n * itemsize, 0
        if buffer.state is not None:
            codec, size = CODECS[buffer.dtype], self.manifest.chunk_elements
            begin = index * self._rule.record_nbytes(codec, size)
            nbytes = self._rule.record_nbytes(codec, n)
            yield buffer.state, buffer.state.offset + begin, nbytes, self._param_nbytes

    def _issue(self, buffer: Buffer, index: int) -> int:
        slot, self._next = self._next, 1 - self._next
        self._end_reads(slot)  # a failure was of what nobody wants any more
        self._held[slot] = (id(buffer), index)
        address = self._arenas[slot].address
        self._tickets[slot] = [
            self._engine.read(address + place, round_up(nbytes, PAGE_NBYTES), offset)
            for _, offset, nbytes, place in self._ranges(buffer, index)
            if nbytes
        ]
        return slot

    def chunk(self, buffer: Buffer, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(parameters, record) of one chunk as uint8, valid until the next but one call. Raises CorruptError."""
        key = (id(buffer), index)
        fresh = key not in self._held or bool(self._tickets[self._held.index(key)])
        slot = self._held.index(key) if key in self._held else self._issue(buffer, index)
        if (index + 1) * self.manifest.chunk_elements < buffer.n_elements and (
            id(buffer),
            index + 1,
        ) not in self._held:
            self._next = 1 - slot
            self._issue(buffer, index + 1)
        if fresh:
            self._verify(buffer, index, slot)
        piece = self._arenas[slot].bytes_tensor
        n = self.elements(buffer, index)
        state_nbytes = 0
        if buffer.state is not None:
            state_nbytes = self._rule.record_nbytes(CODECS[buffer.dtype], n)
        param = piece[: n * dtype_named(buffer.dtype).itemsize]
        return param, piece[self._param_nbytes : self._param_nbytes + state_nbytes]

    def verify(self) -> None:
        """Read everything. Raises CorruptError, with its place, for the first chunk that is not what was written."""
        for block in self.manifest.blocks:
            for buffer in block.buffers:
                for index in range(-(-buffer.n_elements // self.manifest.chunk_elements)):
                    self.chunk(buffer, index)

    def _end_reads(self, slot: int) -> OSError | None:
        """Wait for all reads into a piece, so that it may be read into again. The first failure."""
        tickets, self._tickets[slot] = self._tickets[slot], []
        failure: OSError | None = None
        for ticket in tickets:
            try:
                ticket.wait()
            except OSError as error:
                failure = failure or error
        return failure

    def _verify(self, buffer: Buffer, index: int, slot: int) -> None:
        failure = self._end_reads(slot)
        if failure is not None:
            self._held[slot] = None
            raise CorruptError(f"{self._paths[0]}: cannot be read: {failure}") from failure
        for extent, offset, nbytes, place in self._ranges(buffer, index):
            expected = int(extent.checksums()[index])
            found = crc32c(self._arenas[slot].address + place, nbytes)
            if found != expected:
                self._held[slot] = None
                name = buffer.parameters[0].name if buffer.parameters else "?"
                raise CorruptError(
                    f"{self._paths[0]}: {nbytes} bytes at offset {offset} (of the buffer of {name}) have CRC32C "
                    f"{found:08x}, {expected:08x} was written: the drive or another program has changed them; "
                    "resume from another checkpoint"
                )

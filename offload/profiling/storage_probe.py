"""Storage rates, measured with the library's own engine on its own store files, with bounded writes.

[Note: what a drive is asked] A file is filled once, so that later writes go to written extents as in training; then
writes, reads, and both at once are timed. Consumer drives take the first gigabytes into a fast cache, so the write rate
of a short probe is the cache's: the profile says so, and the figure can be overridden.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from offload.config import Config
from offload.errors import ConfigError
from offload.planner.hardware import Drive
from offload.profiling.compute_probe import UpdateLoop
from offload.tiers.host import HostArena
from offload.tiers.storage import Store
from offload.transfer.io_engine import Ticket

Backend = Literal["auto", "uring", "posix"]

CHUNK_NBYTES = 4 << 20
"""Bytes of one request and drive; the engine cuts it into blocks."""

IN_FLIGHT = 8
"""Requests in flight."""

STRIPE_NBYTES = 1 << 20
_STEP_NBYTES = 4 * CHUNK_NBYTES
"""Of a drive's file. Half of it, as all drives together use, is still two requests."""
_WRITES_PER_FILE = 3.75
"""How often, at most, the bytes of a drive's file are written: filled, written, mixed; half of that by all drives."""


@dataclass(frozen=True)
class Rates:
    """Bytes a second: reading, writing, and both directions together while half of each is moved."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    mixed_bytes_per_s: float
    is_direct: bool


def check_limit(written_nbytes_max: int) -> None:
    """Raise ConfigError for a limit of bytes written a drive that is too low to measure with."""
    smallest = int(_WRITES_PER_FILE * _STEP_NBYTES)
    if written_nbytes_max < smallest:
        raise ConfigError(
            f"a write limit of {written_nbytes_max} bytes a drive is too low to measure with: at least {smallest}"
        )


def probe_drives(
    directories: Sequence[str],
    *,
    written_nbytes_max: int,
    seconds: float,
    note: Callable[[str], None],
    backend: Backend = "auto",
) -> tuple[tuple[Drive, ...], Rates | None, bool]:
    """Each directory's drive alone, then all together (None for a single one), and whether the page cache was avoided.

    Writes at most `written_nbytes_max` bytes to each directory and takes about `seconds`; every file is removed,
    whatever happens. `backend` is that of the I/O engine. Raises ConfigError for a limit that is too low to measure
    with, StoreError for a full disk.
    """
    check_limit(written_nbytes_max)
    file_nbytes = int(written_nbytes_max / _WRITES_PER_FILE) // _STEP_NBYTES * _STEP_NBYTES
    n_phases = 4 * (len(directories) + (len(directories) > 1))
    phase_s = seconds / n_phases
    rates = []
    for directory in directories:
        note(f"storage {directory}: write, read, both")
        rates.append(_measure([directory], file_nbytes, phase_s, backend))
    together = None
    if len(directories) > 1:
        note(f"storage: {len(directories)} drives together")
        together = _measure(directories, file_nbytes // 2, phase_s, backend)
    drives = tuple(
        Drive(
            name=os.path.abspath(directory),
            read_bytes_per_s=rate.read_bytes_per_s,
            write_bytes_per_s=rate.write_bytes_per_s,
            mixed_bytes_per_s=rate.mixed_bytes_per_s,
            capacity_nbytes=shutil.disk_usage(directory).total,
        )
        for directory, rate in zip(directories, rates, strict=True)
    )
    return drives, together, all(rate.is_direct for rate in rates)


def _measure(directories: Sequence[str], file_nbytes: int, phase_s: float, backend: Backend) -> Rates:
    """Rates of a store of `file_nbytes` in each of `directories`, each figure in about `phase_s`."""
    with _open(directories, file_nbytes, backend) as store:
        mover = _Mover(store, file_nbytes * len(directories), CHUNK_NBYTES * len(directories))
        filled = mover.run("w", phase_s, once=True)
        mover.limit(filled.written_nbytes)
        written = mover.run("w", phase_s, once=True)
        read = mover.run("r", phase_s, once=not store.engine.direct)
        mixed = mover.run("rw", phase_s, once=True)
        return Rates(read.bytes_per_s, written.bytes_per_s, mixed.bytes_per_s, store.engine.direct)


class DriveLoop:
    """A scratch store that is asked as a training run asks, for measuring again and again.

    Reads and writes alone go in requests of one chunk of optimizer state, as many in flight as the update pipeline has
    buffers, over a file as large as a run's (a small one would stay in a cache of the drive); `stream` is the update
    pipeline itself on another part of the store. Writes `nbytes` once at the start.
    """

    def __init__(self, directories: Sequence[str], nbytes: int = 1 << 30) -> None:
        settings = Config()
        request_nbytes = settings.chunk_elements * 10
        file_nbytes = nbytes // 2 // request_nbytes * request_nbytes
        self._open = _open(directories, -(-nbytes // len(directories)))
        store = self._open.__enter__()
        store.allocate(file_nbytes)
        self._mover = _Mover(store, file_nbytes, request_nbytes, settings.chunk_buffers)
        self._mover.run("w", 600.0, once=True)
        self.stream = UpdateLoop(store, nbytes - file_nbytes)

    def alone(self, seconds: float) -> tuple[float, float]:
        """Bytes a second of reading and of writing, half of `seconds` each."""
        read, written = (self._mover.run(how, seconds / 2, once=False) for how in ("r", "w"))
        return read.bytes_per_s, written.bytes_per_s

    def measure(self, seconds: float) -> Drive:
        """The drives as one; half of `seconds` for the pipeline.

        What reads and writes do together follows from the pipeline's parameters a second: 10 bytes read and 12 written
        take 1 / c of the time that they would take one after the other, and c = mixed (1 / read + 1 / write) / 2.
        """
        read_per_s, write_per_s = self.alone(seconds / 2)
        params_per_s = self.stream.params_per_s(seconds / 2)
        capacity = params_per_s * (10 / read_per_s + 12 / write_per_s)
        return Drive(
            read_bytes_per_s=read_per_s,
            write_bytes_per_s=write_per_s,
            mixed_bytes_per_s=2 * capacity / (1 / read_per_s + 1 / write_per_s),
        )

    def close(self) -> None:
        """End the threads and remove the files."""
        self.stream.close()
        self._open.__exit__(None, None, None)


@contextlib.contextmanager
def _open(directories: Sequence[str], file_nbytes: int, backend: Backend = "auto") -> Iterator[Store]:
    store = Store(
        list(directories),
        file_nbytes * len(directories),
        stripe_nbytes=STRIPE_NBYTES,
        backend=backend,
        direct=True,
        block_nbytes=1 << 20,
        queue_depth=32,
        keep=False,
    )
    try:
        yield store
    finally:
        store.close()


@dataclass(frozen=True)
class _Moved:
    read_nbytes: int
    written_nbytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return (self.read_nbytes + self.written_nbytes) / self.seconds


class _Mover:
    """Keeps `IN_FLIGHT` requests going over one store, from random bytes (drives may compress)."""

    def __init__(self, store: Store, nbytes: int, chunk_nbytes: int, in_flight: int = IN_FLIGHT) -> None:
        self._store = store
        self._chunk_nbytes = chunk_nbytes
        self._nbytes = nbytes
        self._in_flight = in_flight
        self._cursor = 0
        arena = HostArena(in_flight * self._chunk_nbytes)
        arena.bytes_tensor.view(torch.int64).random_()
        self._buffers = [arena.take(self._chunk_nbytes) for _ in range(in_flight)]
        store.engine.register_buffer(arena.address, arena.nbytes)

    def limit(self, nbytes: int) -> None:
        """Use only the first `nbytes`, in whole chunks, at least two."""
        chunks = min(max(2, nbytes // self._chunk_nbytes), self._nbytes // self._chunk_nbytes)
        self._nbytes = chunks * self._chunk_nbytes

    def run(self, directions: str, seconds: float, *, once: bool) -> _Moved:
        """Move chunk after chunk, the directions in turn, until `seconds` are over or, if `once`, all bytes are moved.

        Data are on the drives when it returns: writes are flushed inside the time.
        """
        if "r" in directions and not self._store.engine.direct:
            self._forget_cache()
        moved = dict.fromkeys("rw", 0)
        waiting: deque[Ticket] = deque()
        start = time.perf_counter()
        n_chunks = self._nbytes // self._chunk_nbytes
        try:
            for index in self._indices(n_chunks, once):
                if index >= 2 and time.perf_counter() - start > seconds:
                    break
                if len(waiting) == self._in_flight:
                    waiting.popleft().wait()
                direction = directions[index % len(directions)]
                chunk = (self._cursor + index) % n_chunks
                waiting.append(self._submit(direction, self._buffers[index % self._in_flight], chunk))
                moved[direction] += self._chunk_nbytes
        finally:
            for ticket in waiting:
                ticket.wait()
        if not once:
            self._cursor = (self._cursor + sum(moved.values()) // self._chunk_nbytes) % n_chunks
        if "w" in directions:
            self._flush()
        return _Moved(moved["r"], moved["w"], time.perf_counter() - start)

    @staticmethod
    def _indices(n_chunks: int, once: bool) -> Iterator[int]:
        index = 0
        while not once or index < n_chunks:
            yield index
            index += 1

    def _submit(self, direction: str, buffer: torch.Tensor, chunk: int) -> Ticket:
        move = self._store.engine.read if direction == "r" else self._store.engine.write
        return move(buffer.data_ptr(), self._chunk_nbytes, chunk * self._chunk_nbytes)

    def _flush(self) -> None:
        for path in self._store.paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _forget_cache(self) -> None:
        for path in self._store.paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

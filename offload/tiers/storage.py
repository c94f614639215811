"""The store: one preallocated, locked file per storage directory and run, with extents inside."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Sequence

from offload._C import Engine
from offload.errors import StoreError
from offload.tiers.durable_files import naming, rename, sync_directory, write_file
from offload.tiers.mounts import IN_MEMORY, mount_of
from offload.types import PAGE_NBYTES, round_up

logger = logging.getLogger("offload")


def leftover_stores(directory: str) -> list[tuple[str, int]]:
    """Path and bytes of the store files in `directory` that no process has open: runs that were killed, or kept."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "offload-*.store"))):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found.append((path, os.fstat(descriptor).st_blocks * 512))
            finally:
                os.close(descriptor)
    return found


def _leftovers_hint(directory: str) -> str:
    leftover = leftover_stores(directory)
    if not leftover:
        return ""
    nbytes = sum(n for _, n in leftover)
    return (
        f". {len(leftover)} store files of runs that have ended take {nbytes / 1e9:.2f} GB there; if none was kept on "
        f"purpose: rm {os.path.join(directory, 'offload-*.store')}"
    )


_LESS_HERE = "add another directory to storage=[...], or raise host_memory"


def _preallocate(path: str, descriptor: int, file_nbytes: int, reserved_nbytes: int = 0) -> None:
    """Reserve the whole file, of which the first bytes may be so already, so that a full disk shows before training.
    Raises StoreError."""
    try:
        os.posix_fallocate(descriptor, reserved_nbytes, file_nbytes - reserved_nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            remedy = f"free some space, {_LESS_HERE}{_leftovers_hint(os.path.dirname(path))}"
            if error.errno == errno.EFBIG:
                remedy = (
                    f"raise the limit on the size of a file (ulimit -f, or the file system's), {_LESS_HERE}"
                )
            raise StoreError(
                f"{path}: cannot preallocate {file_nbytes} bytes: {error.strerror}: {remedy}"
            ) from error
        logger.warning(
            "%s: this file system cannot reserve space; a full disk will show during training", path
        )
        with naming(path):
            os.ftruncate(descriptor, file_nbytes)


def _remove(
    owner_pid: int, keep: list[bool], paths: list[str], descriptors: list[int], engines: list[Engine]
) -> None:
    """Stop the engine, unlock and (unless kept) remove the files; at the latest when the process exits."""
    if os.getpid() != owner_pid:
        return  # a fork: threads, lock and files are the parent's
    for engine in engines:
        engine.cancel()
        engine.close()
    for descriptor in descriptors:
        os.close(descriptor)
    descriptors.clear()
    if not keep[0]:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def free_nbytes(directories: Sequence[str]) -> int:
    """Bytes that a store striped evenly over `directories` can have now; those of one file system share its room.

    A directory that is not there yet counts as the nearest one above it.
    """
    places = []
    for directory in directories:
        path = os.path.abspath(directory)
        while not os.path.isdir(path) and path != os.path.dirname(path):
            path = os.path.dirname(path)
        places.append((os.stat(path).st_dev, shutil.disk_usage(path).free))
    sharing = Counter(device for device, _ in places)
    return len(places) * min((free // sharing[device] for device, free in places), default=0)


class Store:
    """Files `offload-<run id>-<drive>.store`, striped by the engine, and a bump allocator of extents.

    Each file is locked exclusively for as long as it is open, readable by its owner only, and removed by `close` (or
    when the store is forgotten, or the interpreter exits) unless `keep` is set. Preallocated ranges read as zeros, so
    fresh optimizer states need not be written.
    """

    def __init__(
        self,
        directories: Sequence[str],
        capacity_nbytes: int,
        *,
        stripe_nbytes: int,
        backend: str,
        direct: bool,
        block_nbytes: int,
        queue_depth: int,
        keep: bool,
    ) -> None:
        self.run_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
        self._keep = [keep]
        self.paths: list[str] = []
        self._paths_to_remove: list[str] = []
        self._descriptors: list[int] = []
        engines: list[Engine] = []
        self._finalizer = weakref.finalize(
            self, _remove, os.getpid(), self._keep, self._paths_to_remove, self._descriptors, engines
        )
        self._end_nbytes = 0
        self._stripe_nbytes = self.stripe_nbytes = stripe_nbytes
        self.capacity_nbytes = capacity_nbytes
        self.closed = self._told_of_deleted = False
        self._file_nbytes = self._file_nbytes_for(max(capacity_nbytes, 1), len(directories))
        try:
            for drive, directory in enumerate(directories):
                self._create(directory, drive, self._file_nbytes)
            self.engine = Engine(
                self.paths,
                backend=backend,
                direct=direct,
                block_nbytes=block_nbytes,
                queue_depth=queue_depth,
                stripe_nbytes=stripe_nbytes,
            )
            engines.append(self.engine)
            self._warn_unless_direct(direct)
        except BaseException:
            self._finalizer()
            raise

    def _warn_unless_direct(self, asked: bool) -> None:
        directories = dict.fromkeys(map(os.path.dirname, self.paths))
        if (
            asked
            and not self.engine.direct
            and not any(mount_of(directory).get("file_system") in IN_MEMORY for directory in directories)
        ):
            logger.warning(
                "%s: a file system here, or its drive, has no direct I/O of 4096 bytes: transfers go through the page "
                "cache, which takes time and memory",
                ", ".join(directories),
            )

    def _file_nbytes_for(self, capacity_nbytes: int, n_drives: int) -> int:
        """Bytes of each file: its stripes, and a page that stays unwritten (see `check_intact`)."""
        stripes = -(-capacity_nbytes // self._stripe_nbytes)
        return -(-stripes // n_drives) * self._stripe_nbytes + PAGE_NBYTES

    def _create(self, directory: str, drive: int, file_nbytes: int) -> None:
        try:
            if not os.path.isdir(directory):
                os.mkdir(directory)
        except FileNotFoundError as error:
            raise StoreError(
                f"{directory}: no such directory, and none above it: is the drive mounted? If it is meant to be there, "
                f"mkdir -p {os.path.dirname(os.path.abspath(directory))}"
            ) from error
        except OSError as error:
            raise StoreError(
                f"{directory}: cannot be made: {error.strerror}: name a directory that this user can write to"
            ) from error
        if mount_of(directory).get("file_system") in IN_MEMORY:
            logger.warning(
                "%s is not on a drive but in DRAM, outside of host_memory and device_memory: name a directory on a "
                "drive, or leave storage out and raise host_memory",
                directory,
            )
        free_nbytes = shutil.disk_usage(directory).free
        if free_nbytes < file_nbytes:
            raise StoreError(
                f"{directory}: the store needs {file_nbytes / 1e9:.2f} GB here and {free_nbytes / 1e9:.2f} GB are "
                "free: free some space, add another directory to storage=[...], or raise host_memory"
                f"{_leftovers_hint(directory)}"
            )
        path = os.path.join(directory, f"offload-{self.run_id}-{drive}.store")
        try:
            descriptor = os.open(path + ".new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be created: {error.strerror}: name a directory that this user can write to"
            ) from error
        self._paths_to_remove += [path + ".new", path]
        self._descriptors.append(descriptor)
        # Locked before it has a name that others look for: one of that name without a lock is a dead run's.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        rename(path + ".new", path)
        self.paths.append(path)
        _preallocate(path, descriptor, file_nbytes)

    def allocate(self, nbytes: int) -> int:
        """Offset of a fresh page-aligned extent of `nbytes`. Raises StoreError when the store is full."""
        offset, end_nbytes = self._end_nbytes, self._end_nbytes + round_up(nbytes, PAGE_NBYTES)
        if end_nbytes > self.capacity_nbytes:
            raise StoreError(
                f"store {self.paths[0]} is full: {end_nbytes} bytes wanted of {self.capacity_nbytes}"
            )
        self._end_nbytes = end_nbytes
        return offset

    def check_intact(self) -> None:
        """Raise StoreError when a file has been cut short by somebody else: what was behind the cut reads as zeros.
        One that has been deleted serves to the end of the run, which is said once.

        The engine never writes a file's last page, so no write of ours makes a cut file as long as it was.
        """
        for path, descriptor in zip(self.paths, self._descriptors, strict=True):
            found = os.fstat(descriptor)
            if found.st_nlink == 0 and not self._told_of_deleted:
                self._told_of_deleted = True
                logger.warning(
                    "%s: has been deleted by another program; training goes on in it, and its room is free only when "
                    "the run ends: name storage directories that nothing else cleans",
                    path,
                )
            found_nbytes = found.st_size
            if found_nbytes < self._file_nbytes:
                raise StoreError(
                    f"{path}: has been truncated to {found_nbytes} of {self._file_nbytes} bytes by another program; "
                    "training state is lost: start again, with storage directories that nothing else cleans"
                )

    def refuse_deleted(self) -> None:
        """Raise StoreError when a file has been deleted by somebody else: nothing could be resumed from it."""
        for path, descriptor in zip(self.paths, self._descriptors, strict=True):
            if os.fstat(descriptor).st_nlink == 0:
                raise StoreError(
                    f"{path}: has been deleted by another program, and no process could resume this run: offload.save "
                    "still writes all of it elsewhere; go on from there with offload.resume, with storage directories "
                    "that nothing else cleans"
                )

    def grow(self, nbytes: int) -> None:
        """Add `nbytes` of capacity to the files (activation checkpoints, once their size is known).

        Raises StoreError, the capacity unchanged, when a drive has no room or a file has been cut short, which growing
        it would hide.
        """
        self.check_intact()
        capacity_nbytes = self.capacity_nbytes + round_up(nbytes, PAGE_NBYTES)
        file_nbytes = self._file_nbytes_for(capacity_nbytes, len(self.paths))
        for path, descriptor in zip(self.paths, self._descriptors, strict=True):
            if file_nbytes > self._file_nbytes:
                _preallocate(path, descriptor, file_nbytes, self._file_nbytes)
        self.capacity_nbytes, self._file_nbytes = capacity_nbytes, file_nbytes

    def counters(self) -> dict[str, int]:
        """Bytes read and written so far."""
        counted = self.engine.counters()
        return {name: int(counted[name]) for name in ("read_bytes", "written_bytes")}

    def written_by_directory(self) -> dict[str, int]:
        """Bytes written so far to each directory."""
        written: dict[str, int] = {}
        for path, drive in zip(self.paths, self.engine.counters()["drives"], strict=True):
            directory = os.path.dirname(path)
            written[directory] = written.get(directory, 0) + int(drive["written_bytes"])
        return written

    @property
    def file_nbytes(self) -> int:
        """Of each file."""
        return self._file_nbytes

    def adopt(self, run_id: str, paths: list[str], descriptors: list[int], manifests: list[str]) -> None:
        """Go on with the files of a run that has ended, in place of its own, which are removed.

        `paths` are as many, as large, and locked through `descriptors`, which it keeps; `manifests` describe them.
        Nothing may be in flight.
        """
        self.engine.reopen(paths)
        for path in self._paths_to_remove:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self.run_id, self.paths[:], self._descriptors[:] = run_id, paths, descriptors
        self._paths_to_remove[:] = [*manifests, *paths]

    def cancel(self) -> None:
        """The run has been stopped: let all transfers fail that the kernel has not been given, and all later ones."""
        self.engine.cancel()

    @property
    def keep(self) -> bool:
        """Whether the files stay when it closes."""
        return self._keep[0]

    @keep.setter
    def keep(self, keep: bool) -> None:
        self._keep[0] = keep

    def describe(self, content: bytes) -> None:
        """Put `content` beside each of the files as `offload-<run id>.manifest`, durably; it goes when they go."""
        for directory in dict.fromkeys(map(os.path.dirname, self.paths)):
            path = os.path.join(directory, f"offload-{self.run_id}.manifest")
            self._paths_to_remove.insert(0, path)
            write_file(path + ".partial", content)
            rename(path + ".partial", path)
            sync_directory(directory)

    def close(self) -> None:
        """Wait for what is in flight, unlock and (unless kept) remove the files. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        if self._finalizer.alive:
            self.engine.close()  # finishes; the finalizer alone would cancel
        self._finalizer()

"""The store: one preallocated, locked file per storage directory and run, with extents inside."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Sequence

from offload._C import Engine
from offload.errors import StoreError
from offload.types import PAGE_NBYTES, round_up


class Store:
    """Files `offload-<run id>-<drive>.store`, striped by the engine, and a bump allocator of extents.

    Each file is locked exclusively for as long as it is open, readable by its owner only, and removed by `close`
    unless `keep` is set. Preallocated ranges read as zeros, so fresh optimizer states need not be written.
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
        self.keep = keep
        self.paths: list[str] = []
        self._descriptors: list[int] = []
        self._end_nbytes = 0
        self._stripe_nbytes = stripe_nbytes
        self.capacity_nbytes = capacity_nbytes
        self.closed = False
        stripes = -(-max(capacity_nbytes, 1) // stripe_nbytes)
        file_nbytes = -(-stripes // len(directories)) * stripe_nbytes
        try:
            for drive, directory in enumerate(directories):
                self._create(directory, drive, file_nbytes)
            self.engine = Engine(
                self.paths,
                backend=backend,
                direct=direct,
                block_nbytes=block_nbytes,
                queue_depth=queue_depth,
                stripe_nbytes=stripe_nbytes,
            )
        except BaseException:
            self._remove_files()
            raise

    def _create(self, directory: str, drive: int, file_nbytes: int) -> None:
        os.makedirs(directory, exist_ok=True)
        free_nbytes = shutil.disk_usage(directory).free
        if free_nbytes < file_nbytes:
            raise StoreError(
                f"{directory}: the store needs {file_nbytes / 1e9:.2f} GB here and {free_nbytes / 1e9:.2f} GB are "
                "free: free some space, add another directory to storage=[...], or raise host_memory"
            )
        path = os.path.join(directory, f"offload-{self.run_id}-{drive}.store")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.paths.append(path)
        self._descriptors.append(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            os.posix_fallocate(descriptor, 0, file_nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise StoreError(
                    f"{path}: cannot preallocate {file_nbytes} bytes: {error.strerror}"
                ) from error
            os.ftruncate(descriptor, file_nbytes)

    def allocate(self, nbytes: int) -> int:
        """Offset of a fresh page-aligned extent of `nbytes`. Raises StoreError when the store is full."""
        offset = self._end_nbytes
        self._end_nbytes += round_up(nbytes, PAGE_NBYTES)
        if self._end_nbytes > self.capacity_nbytes:
            raise StoreError(
                f"store {self.paths[0]} is full: {self._end_nbytes} bytes wanted of {self.capacity_nbytes}"
            )
        return offset

    def grow(self, nbytes: int) -> None:
        """Add `nbytes` of capacity to the files (activation checkpoints, once their size is known)."""
        self.capacity_nbytes += round_up(nbytes, PAGE_NBYTES)
        stripes = -(-self.capacity_nbytes // self._stripe_nbytes)
        file_nbytes = -(-stripes // len(self.paths)) * self._stripe_nbytes
        for path, descriptor in zip(self.paths, self._descriptors, strict=True):
            try:
                os.posix_fallocate(descriptor, 0, file_nbytes)
            except OSError as error:
                raise StoreError(f"{path}: cannot grow to {file_nbytes} bytes: {error.strerror}") from error

    def close(self) -> None:
        """Wait for what is in flight, unlock and (unless kept) remove the files. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self.engine.close()
        self._remove_files()

    def _remove_files(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        if not self.keep:
            for path in self.paths:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

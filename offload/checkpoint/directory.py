"""A directory of checkpoints: their names, its lock, and the renames that make one appear or go at once."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator

from offload.errors import CheckpointError, StoreError
from offload.tiers.durable_files import naming, rename, sync_directory

logger = logging.getLogger("offload")

MANIFEST_FILE = "manifest.jsonl"
EXTENTS_FILE = "extents.bin"
LOCK_FILE = ".lock"
_NAME = re.compile(r"step-(\d{9,18})(?:-(\d{1,9}))?")
_PARTIAL, _GOING = ".partial-", ".going-"


def checkpoints_in(directory: str) -> list[str]:
    """Paths of the complete checkpoints, the oldest step first; one saved again comes after its first saving."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(directory):
            match = _NAME.fullmatch(name)
            if match and os.path.exists(os.path.join(directory, name, MANIFEST_FILE)):
                found.append((int(match[1]), int(match[2] or 0), os.path.join(directory, name)))
    return [path for _, _, path in sorted(found)]


def newest(directory: str) -> str:
    """The checkpoint that `directory` is, or the newest one in it. Raises CheckpointError when there is none."""
    if os.path.exists(os.path.join(directory, MANIFEST_FILE)):
        return directory
    found = checkpoints_in(directory)
    if not found:
        raise CheckpointError(
            f"{directory}: holds no checkpoint: name the directory that was given to offload.save"
        )
    return found[-1]


@contextlib.contextmanager
def locked(directory: str, *, exclusive: bool) -> Iterator[None]:
    """Hold the directory's lock. Raises CheckpointError when a living process has it; a dead one's is free."""
    path = os.path.join(directory, LOCK_FILE)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if not exclusive:  # a directory that can only be read
            yield
            return
        raise StoreError(
            f"{path}: cannot be created: {error.strerror}: name a directory that can be written"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise CheckpointError(
                f"{directory}: is in use by process {owner}: wait for it, or give every run a directory of its own"
            ) from None
        if exclusive:
            with naming(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class NewCheckpoint:
    """A checkpoint being written: in `path` (hidden) until `commit` renames it. Leaving without removes it.

    `keep_last`: how many the directory has afterwards at most; None: no limit.
    """

    def __init__(self, directory: str, step: int, keep_last: int | None = None) -> None:
        self._directory, self._step, self._keep_last = directory, step, keep_last
        self.path = os.path.join(directory, f"{_PARTIAL}{os.getpid()}-{step}")
        self.final = ""
        """The path it will have; known once it has been entered, for the lock is held."""

    def __enter__(self) -> NewCheckpoint:
        for name in os.listdir(self._directory):  # the lock is ours: whoever left these is dead
            if name.startswith((_PARTIAL, _GOING)):
                shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)
        os.mkdir(self.path, 0o700)
        matches = [_NAME.fullmatch(name) for name in os.listdir(self._directory)]
        attempts = [int(m[2] or 0) for m in matches if m and int(m[1]) == self._step]
        again = f"-{max(attempts) + 1}" if attempts else ""
        self.final = os.path.join(self._directory, f"step-{self._step:09d}{again}")
        return self

    def commit(self) -> None:
        """Everything in `path` has been synced: give it its name, durably; then all go but it and the latest others.

        What an earlier run, or another try, left of later steps is what a resume from the directory takes: said in the
        log where it stays.
        """
        sync_directory(self.path)
        rename(self.path, self.final)
        sync_directory(self._directory)
        if self._keep_last is not None:
            keep_only(self._directory, self._keep_last, self.final)
        last = newest(self._directory)
        if last != self.final:
            logger.warning(
                "%s is saved, but a resume from %s would take %s, which is of a later step: resume from the checkpoint "
                "itself, or give every run a directory of its own",
                *(self.final, self._directory, os.path.basename(last)),
            )

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def keep_only(directory: str, n_last: int, saved: str) -> list[str]:
    """Remove all checkpoints but `saved`, just written, and the `n_last` - 1 latest steps beside it.

    One of an earlier run may be of a later step than `saved`. None is ever seen half removed. Returns the paths that
    went.
    """
    others = [path for path in checkpoints_in(directory) if path != saved]
    going = others[: max(0, len(others) - (n_last - 1))]
    for path in going:
        hidden = os.path.join(directory, _GOING + os.path.basename(path))
        rename(path, hidden)
        sync_directory(directory)
        shutil.rmtree(hidden, ignore_errors=True)
    return going

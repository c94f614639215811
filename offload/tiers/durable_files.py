"""Small files, and names in a directory, put on the drive; an error names the file, which `fsync`'s own does not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from offload.errors import StoreError


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """An error of the system inside becomes a StoreError that names the file."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be put on the drive: {error.strerror}: check the drive and the room on it"
        ) from error


def sync_file(descriptor: int, path: str) -> None:
    """What has been written to the open file is on the drive afterwards. Raises StoreError."""
    with naming(path):
        os.fsync(descriptor)


def sync_directory(directory: str) -> None:
    """The names in it are on the drive afterwards. Raises StoreError."""
    with naming(directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_files(directory: str) -> None:
    """The files in it, whoever wrote them, and their names are on the drive afterwards. Raises StoreError."""
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            with naming(path), open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def write_file(path: str, content: bytes) -> None:
    """A file of `content` that only its owner can read, on the drive, in the place of one of that name.

    Raises StoreError, and leaves none then; whoever gives it its final name does so afterwards.
    """
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(path)
            raise


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write, on the drive under the name `path` when the block has ended, and gone when it has failed.

    Until then it is `path`.partial, and a file that has the name keeps it. Raises StoreError.
    """
    partial = path + ".partial"
    with contextlib.ExitStack() as on_error:
        with open(partial, "wb") as file:
            on_error.callback(os.unlink, partial)
            yield file
            file.flush()
            sync_file(file.fileno(), path)
        on_error.pop_all()
    rename(partial, path)
    sync_directory(os.path.dirname(path) or ".")


def rename(source: str, target: str) -> None:
    """Give a file or a directory another name at once; a file of that name goes. Raises StoreError."""
    with naming(target):
        os.rename(source, target)

"""File systems of a test's own, that can be filled up or taken away; skips where mounting is not allowed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def mounted(place: pathlib.Path, *arguments: str) -> Iterator[pathlib.Path]:
    """`place`, made, with what `mount` puts there."""
    place.mkdir()
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def in_memory(place: pathlib.Path, nbytes: int) -> contextlib.AbstractContextManager[pathlib.Path]:
    """A tmpfs of so many bytes."""
    return mounted(place, "-t", "tmpfs", "-o", f"size={nbytes}", "none")


@contextlib.contextmanager
def on_a_file(
    place: pathlib.Path, kind: str, image: pathlib.Path, nbytes: int, *options: str
) -> Iterator[pathlib.Path]:
    """A file system of this kind on a loop device over `image`, which gets so many bytes."""
    program = shutil.which(f"mkfs.{kind}")
    if program is None or os.geteuid() != 0:
        pytest.skip(f"needs root and mkfs.{kind}")
    with open(image, "wb") as file:
        file.truncate(nbytes)
    made = subprocess.run([program, "-q", *options, str(image)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"mkfs.{kind}: {made.stderr.strip()}")
    with mounted(place, "-o", "loop", str(image)):
        yield place


@contextlib.contextmanager
def of_sectors(
    place: pathlib.Path, image: pathlib.Path, nbytes: int, sector_nbytes: int
) -> Iterator[pathlib.Path]:
    """An XFS of so many bytes on a loop device with sectors of so many."""
    program = shutil.which("mkfs.xfs")
    if program is None or os.geteuid() != 0:
        pytest.skip("needs root and mkfs.xfs")
    with open(image, "wb") as file:
        file.truncate(nbytes)
    arguments = ["losetup", "--find", "--show", "--sector-size", str(sector_nbytes), str(image)]
    attached = subprocess.run(arguments, capture_output=True, text=True)
    if attached.returncode != 0:
        pytest.skip(f"no such loop device here: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        sizes = ["-b", f"size={sector_nbytes}", "-s", f"size={sector_nbytes}"]
        made = subprocess.run([program, "-q", *sizes, device], capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"mkfs.xfs: {made.stderr.strip()}")
        with mounted(place, device):
            yield place
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)

"""Transfers of any file at any alignment leave the file, and the caller's descriptor of it, as plain I/O would."""

from __future__ import annotations

import os

import numpy as np
import pytest

from offload._C import Arena, FileEngine
from tests.unit.test_io_engine import BACKENDS, filled_arena

PAGE_NBYTES = 4096


def make_engine(backend):
    try:
        return FileEngine(backend=backend)
    except OSError as error:
        pytest.skip(f"io_uring is not allowed here: {error}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged_nbytes", [612, 3700])
def test_a_file_written_over_with_a_ragged_end_can_be_synced_and_has_the_bytes(
    tmp_path, backend, ragged_nbytes
):
    """A transfer past the page cache beside one through it in the same page makes the kernel fail the next fsync."""
    engine, path, nbytes = make_engine(backend), tmp_path / "file", 4 * PAGE_NBYTES + ragged_nbytes
    arena, view = filled_arena(5 * PAGE_NBYTES)
    path.write_bytes(bytes(5 * PAGE_NBYTES))
    descriptor = os.open(path, os.O_RDWR)
    try:
        for i in range(40):
            view[:] = i + 1
            engine.write(str(path), arena.address, nbytes, 0).wait(timeout_s=20)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(descriptor, nbytes + 1, 0) == bytes([i + 1]) * nbytes + bytes(1)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reading_by_descriptor_leaves_the_callers_position_where_it_was(tmp_path, backend):
    engine, path = make_engine(backend), tmp_path / "file"
    content = bytes(range(256)) * 64
    path.write_bytes(content)
    arena = Arena(len(content))
    with open(path, "rb", buffering=0) as file:
        file.seek(100)
        engine.read(file.fileno(), arena.address, len(content), 0).wait(timeout_s=20)
        assert file.tell() == 100
        assert file.read(10) == content[100:110]
    assert np.frombuffer(arena, dtype=np.uint8).tobytes() == content


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_end_cannot_be_read_by_descriptor(backend):
    engine, arena = make_engine(backend), Arena(PAGE_NBYTES)
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="cannot find the end"):
            engine.read(reader, arena.address, PAGE_NBYTES, 0)
    finally:
        os.close(reader)
        os.close(writer)

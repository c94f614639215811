"""The engine returns what was written, whatever the backend, striping or fault, and never leaves a waiter hanging."""

import os
import pathlib
import time

import numpy as np
import pytest

from offload._C import Arena, Engine

MIB = 1 << 20
BACKENDS = ["uring", "posix"]


def make_files(directory, n_files, nbytes):
    paths = []
    for i in range(n_files):
        path = directory / f"drive{i}"
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        paths.append(str(path))
    return paths


def make_engine(paths, backend, **options):
    try:
        return Engine(paths, backend=backend, **options)
    except OSError as error:
        if backend == "uring":
            pytest.skip(f"io_uring is not allowed here: {error}")
        raise


def filled_arena(nbytes, seed=0):
    arena = Arena(nbytes)
    view = np.frombuffer(arena, dtype=np.uint8)
    view[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return arena, view


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_drives", [1, 2, 3])
@pytest.mark.parametrize("registered", [False, True])
def test_reads_return_what_was_written(tmp_path, backend, n_drives, registered):
    nbytes = 5 * MIB + 12288
    engine = make_engine(
        make_files(tmp_path, n_drives, 8 * MIB), backend, block_nbytes=MIB // 4, stripe_nbytes=MIB // 2
    )
    source, source_view = filled_arena(nbytes)
    target = Arena(nbytes)
    if registered:
        engine.register_buffer(source.address, source.nbytes)
        engine.register_buffer(target.address, target.nbytes)
    engine.write(source.address, nbytes, 8192).wait()
    engine.read(target.address, nbytes, 8192).wait()
    np.testing.assert_array_equal(np.frombuffer(target, dtype=np.uint8), source_view)
    counters = engine.counters()
    assert counters["read_bytes"] == counters["written_bytes"] == nbytes
    engine.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stripes_lie_round_robin_over_the_drives(tmp_path, backend):
    paths = make_files(tmp_path, 2, 4 * MIB)
    engine = make_engine(paths, backend, stripe_nbytes=MIB)
    source, view = filled_arena(4 * MIB)
    engine.write(source.address, 4 * MIB, 0).wait()
    engine.close()
    stripes = view.reshape(4, MIB)
    for drive in (0, 1):
        on_disk = np.fromfile(paths[drive], dtype=np.uint8)[: 2 * MIB].reshape(2, MIB)
        np.testing.assert_array_equal(on_disk, stripes[drive::2])


@pytest.mark.fault
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("short_nbytes", [4096, 5000, 12288])
def test_short_transfers_are_resumed(tmp_path, backend, short_nbytes):
    inject = {"short_every": 2, "short_nbytes": short_nbytes}
    engine = make_engine(make_files(tmp_path, 1, 4 * MIB), backend, block_nbytes=MIB // 8, inject=inject)
    source, view = filled_arena(2 * MIB)
    target = Arena(2 * MIB)
    engine.write(source.address, 2 * MIB, 0).wait()
    engine.read(target.address, 2 * MIB, 0).wait()
    np.testing.assert_array_equal(np.frombuffer(target, dtype=np.uint8), view)
    assert engine.counters()["read_bytes"] == 2 * MIB


@pytest.mark.fault
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "code"), [("read", 5), ("write", 28)])
def test_a_failed_transfer_names_path_offset_length_and_errno(tmp_path, backend, op, code):
    paths = make_files(tmp_path, 1, 4 * MIB)
    engine = make_engine(paths, backend, block_nbytes=MIB, inject={"fail_nth": 2, "errno": code, "op": op})
    arena = Arena(4 * MIB)
    ticket = getattr(engine, op)(arena.address, 4 * MIB, 0)
    with pytest.raises(OSError, match=paths[0]) as caught:
        ticket.wait(timeout_s=20)
    assert caught.value.errno == code
    assert str(MIB) in str(caught.value)
    assert "offset" in str(caught.value)
    getattr(engine, op)(arena.address, MIB, 0).wait(timeout_s=20)


@pytest.mark.fault
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code", [4, 11])
def test_interrupted_transfers_are_tried_again(tmp_path, backend, code):
    engine = make_engine(make_files(tmp_path, 1, MIB), backend, inject={"fail_nth": 1, "errno": code})
    arena = Arena(MIB)
    engine.write(arena.address, MIB, 0).wait(timeout_s=20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reading_past_a_truncated_file_is_an_error_not_a_hang(tmp_path, backend):
    paths = make_files(tmp_path, 1, 2 * MIB)
    engine = make_engine(paths, backend)
    os.truncate(paths[0], MIB)
    arena = Arena(2 * MIB)
    with pytest.raises(OSError, match="truncated"):
        engine.read(arena.address, 2 * MIB, 0).wait(timeout_s=20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_finishes_what_is_in_flight_and_refuses_the_rest(tmp_path, backend):
    engine = make_engine(make_files(tmp_path, 1, 32 * MIB), backend, block_nbytes=MIB, queue_depth=2)
    arena = Arena(32 * MIB)
    tickets = [engine.write(arena.address, 32 * MIB, 0) for _ in range(3)]
    engine.close()
    for ticket in tickets:
        ticket.wait(timeout_s=20)
    with pytest.raises(OSError, match="closed"):
        engine.write(arena.address, MIB, 0).wait(timeout_s=20)


def test_unaligned_requests_are_refused_before_any_io(tmp_path):
    engine = make_engine(make_files(tmp_path, 1, MIB), "posix")
    arena = Arena(MIB)
    for address, nbytes, offset in [(1, 4096, 0), (0, 100, 0), (0, 4096, 512)]:
        with pytest.raises(ValueError, match="4096"):
            engine.read(arena.address + address, nbytes, offset)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        Engine([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("backend", ["posix", "auto"])
def test_an_engine_goes_on_with_another_file_and_keeps_its_buffers_and_counts(tmp_path, backend):
    paths = [str(tmp_path / name) for name in ("one", "other")]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(1 << 20)
    engine, arena = Engine([paths[0]], backend=backend), Arena(8192)
    engine.register_buffer(arena.address, arena.nbytes)
    memory = memoryview(arena).cast("B")
    memory[:] = b"a" * 8192
    engine.write(arena.address, 8192, 4096).wait()
    before = engine.counters()
    with pytest.raises(OSError, match="cannot open"):
        engine.reopen([str(tmp_path / "missing")])
    with pytest.raises(ValueError, match="as many files"):
        engine.reopen(paths)
    memory[:] = b"b" * 8192
    engine.write(arena.address, 8192, 4096).wait()  # nothing has changed
    engine.reopen([paths[1]])
    memory[:] = b"c" * 8192
    engine.write(arena.address, 8192, 4096).wait()
    engine.read(arena.address, 4096, 0).wait()
    assert bytes(memory[:4096]) == bytes(4096)
    after = engine.counters()
    assert after["written_bytes"] - before["written_bytes"] == 2 * 8192
    assert after["read_bytes"] - before["read_bytes"] == 4096
    engine.close()
    contents = [pathlib.Path(path).read_bytes()[4096 : 4096 + 8192] for path in paths]
    assert contents == [b"b" * 8192, b"c" * 8192]


def test_a_drive_of_a_stated_rate_takes_the_time_its_bytes_take(tmp_path):
    """8 MB at 40 MB/s: a fifth of a second, however many transfers it is cut into."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    engine, arena = Engine([str(path)], inject={"bytes_per_s": 40e6}), Arena(8 << 20)
    begin_s = time.perf_counter()
    tickets = [engine.read(arena.address + at, 1 << 20, at) for at in range(0, 8 << 20, 1 << 20)]
    for ticket in tickets:
        ticket.wait()
    assert time.perf_counter() - begin_s >= (8 << 20) / 40e6
    engine.close()

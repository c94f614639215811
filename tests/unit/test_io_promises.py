"""What the I/O engine promises beyond moving bytes: bounds, batches, errors that name their place, harmless waits."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from offload._C import Arena, Engine
from tests.unit.test_io_engine import BACKENDS, MIB, filled_arena, make_engine, make_files


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_nbytes", [4096, 65536, MIB])
def test_a_transfer_is_cut_at_the_block_size_that_was_set(tmp_path, backend, block_nbytes):
    engine = make_engine(make_files(tmp_path, 1, 2 * MIB), backend, block_nbytes=block_nbytes)
    arena = Arena(2 * MIB)
    engine.write(arena.address, 2 * MIB, 0).wait(timeout_s=20)
    assert engine.counters()["write_ops"] == 2 * MIB // block_nbytes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_depth", [1, 3])
def test_the_kernel_never_has_more_transfers_than_the_queue_depth(tmp_path, backend, queue_depth):
    engine = make_engine(
        make_files(tmp_path, 1, 8 * MIB), backend, block_nbytes=MIB // 16, queue_depth=queue_depth
    )
    arena = Arena(8 * MIB)
    for ticket in [engine.write(arena.address, 8 * MIB, 0), engine.read(arena.address, 8 * MIB, 0)]:
        ticket.wait(timeout_s=20)
    assert engine.counters()["in_flight_max"] == queue_depth


def test_io_uring_takes_a_whole_batch_in_one_call(tmp_path):
    engine = make_engine(make_files(tmp_path, 1, 16 * MIB), "uring", block_nbytes=MIB // 16, queue_depth=256)
    arena = Arena(16 * MIB)
    engine.write(arena.address, 16 * MIB, 0).wait(timeout_s=20)
    counters = engine.counters()
    assert counters["write_ops"] == 256
    assert counters["submit_calls"] <= 16


def ring_descriptions():
    """/proc/self/fdinfo of every ring of this process."""
    texts = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if "io_uring" in os.readlink(f"/proc/self/fd/{descriptor}"):
                with open(f"/proc/self/fdinfo/{descriptor}") as file:
                    texts.append(file.read())
        except OSError:
            continue
    return texts


def test_the_file_and_the_arena_are_registered_with_the_ring(tmp_path):
    before = len(ring_descriptions())
    engine = make_engine(make_files(tmp_path, 1, MIB), "uring")
    arena = Arena(MIB)
    if not engine.register_buffer(arena.address, arena.nbytes):
        pytest.skip("the kernel refuses to register buffers here (ulimit -l)")
    texts = ring_descriptions()
    assert len(texts) == before + 1
    described = [text for text in texts if f"{arena.address:#x}/" in text]
    if not any("UserFiles" in text for text in texts):
        pytest.skip("this kernel does not describe rings in /proc")
    assert len(described) == 1
    assert "UserFiles:\t1" in described[0]
    engine.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transfer_above_the_kernels_2_gib_limit_is_split(backend):
    """/dev/null takes at most 2,147,479,552 bytes a call, as every file does, and touches no memory."""
    nbytes = (3 << 30) + 4096
    engine = make_engine(["/dev/null"], backend, direct=False, block_nbytes=1 << 30)
    arena = Arena(nbytes)
    engine.write(arena.address, nbytes, 0).wait(timeout_s=20)
    counters = engine.counters()
    assert counters["written_bytes"] == nbytes
    assert counters["write_ops"] == 4


def test_a_block_size_above_the_limit_is_refused():
    with pytest.raises(ValueError, match="1 GiB"):
        Engine(["/dev/null"], backend="posix", direct=False, block_nbytes=2 << 30)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_on_both_sides_of_2_gib_arrive_in_one_transfer(tmp_path, backend):
    nbytes = (2 << 30) + MIB
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, nbytes)
    engine = make_engine([str(path)], backend, block_nbytes=64 * MIB)
    arena = Arena(nbytes)
    view = np.frombuffer(arena, dtype=np.uint8)
    places = [0, (1 << 31) - 8192, (1 << 31) - 4096, 1 << 31, nbytes - 4096]
    for i, place in enumerate(places):
        view[place : place + 4096] = i + 1
    engine.write(arena.address, nbytes, 0).wait(timeout_s=100)
    engine.close()
    with open(path, "rb") as file:
        for i, place in enumerate(places):
            assert os.pread(file.fileno(), 4096, place) == bytes([i + 1]) * 4096
        assert os.pread(file.fileno(), 4096, 1 << 30) == bytes(4096)


@pytest.mark.fault
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [(5, "smartctl"), (28, "free space"), (19, "the drive is gone"), (6, "the drive is gone")],
)
def test_the_ticket_names_path_offset_length_and_errno(tmp_path, backend, op, code, advice):
    inject = {"fail_nth": 3, "errno": code, "op": op}
    paths = make_files(tmp_path, 1, 4 * MIB)
    engine = make_engine(paths, backend, block_nbytes=MIB, queue_depth=1, inject=inject)
    arena = Arena(4 * MIB)
    with pytest.raises(
        OSError, match=f"{op} of {MIB} bytes at offset {2 * MIB} of {paths[0]}: failed"
    ) as caught:
        getattr(engine, op)(arena.address, 4 * MIB, 0).wait(timeout_s=20)
    assert caught.value.errno == code
    assert os.strerror(code) in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code", [4, 11])
def test_eintr_and_eagain_are_retried_up_to_a_limit_and_then_reported(tmp_path, backend, code):
    arena = Arena(MIB)
    for fail_count in (64, 65):
        inject = {"fail_nth": 1, "fail_count": fail_count, "errno": code}
        paths = make_files(tmp_path, 1, MIB)
        engine = make_engine(paths, backend, inject=inject)
        ticket = engine.write(arena.address, MIB, 0)
        if fail_count == 64:
            ticket.wait(timeout_s=20)
            continue
        with pytest.raises(OSError, match=f"{paths[0]}: still interrupted after 64 attempts") as caught:
            ticket.wait(timeout_s=20)
        assert caught.value.errno == code


@pytest.mark.fault
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_unlinked_behind_our_back_keeps_its_bytes(tmp_path, backend):
    paths = make_files(tmp_path, 1, MIB)
    engine = make_engine(paths, backend)
    source, view = filled_arena(MIB)
    target = Arena(MIB)
    os.unlink(paths[0])
    engine.write(source.address, MIB, 0).wait(timeout_s=20)
    engine.read(target.address, MIB, 0).wait(timeout_s=20)
    np.testing.assert_array_equal(np.frombuffer(target, dtype=np.uint8), view)


@pytest.mark.fault
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_waiter_hangs_on_a_failed_transfer(tmp_path, backend):
    inject = {"fail_nth": 2, "errno": 5, "delay_ms": 100}
    engine = make_engine(make_files(tmp_path, 1, 4 * MIB), backend, queue_depth=2, inject=inject)
    arena = Arena(4 * MIB)
    ticket = engine.write(arena.address, 4 * MIB, 0)
    errors = []

    def wait():
        try:
            ticket.wait(timeout_s=20)
        except OSError as error:
            errors.append(error.errno)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert errors == [5] * 8


@pytest.mark.fault
@pytest.mark.parametrize("backend", BACKENDS)
def test_cancelling_fails_what_is_queued_and_closing_then_waits_for_little(tmp_path, backend):
    """64 blocks of 50 ms, one at a time: finishing takes 3.2 s."""
    inject = {"delay_ms": 50}
    engine = make_engine(
        make_files(tmp_path, 1, 4 * MIB), backend, block_nbytes=MIB // 16, queue_depth=1, inject=inject
    )
    arena = Arena(4 * MIB)
    ticket = engine.write(arena.address, 4 * MIB, 0)
    start_s = time.perf_counter()
    engine.cancel()
    engine.close()
    assert time.perf_counter() - start_s < 1.5
    with pytest.raises(OSError, match="cancel") as caught:
        ticket.wait(timeout_s=20)
    assert caught.value.errno == 125
    with pytest.raises(OSError, match="closed"):
        engine.write(arena.address, 4096, 0).wait(timeout_s=20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("waits_in", ["wait", "close"])
def test_the_gil_is_free_while_waiting(tmp_path, backend, waits_in):
    engine = make_engine(make_files(tmp_path, 1, MIB), backend, inject={"delay_ms": 500})
    arena = Arena(MIB)
    turns, running = [0], [True]

    def count():
        while running[0]:
            turns[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    ticket = engine.write(arena.address, MIB, 0)
    before = turns[0]
    ticket.wait(timeout_s=20) if waits_in == "wait" else engine.close()
    during = turns[0] - before
    running[0] = False
    thread.join()
    assert during >= 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wait_can_be_given_a_limit(tmp_path, backend):
    engine = make_engine(make_files(tmp_path, 1, MIB), backend, inject={"delay_ms": 600})
    arena = Arena(MIB)
    ticket = engine.write(arena.address, MIB, 0)
    with pytest.raises(TimeoutError, match="timeout_s"):
        ticket.wait(timeout_s=0.1)
    ticket.wait(timeout_s=20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_drives", [1, 2, 5])
def test_the_engine_spreads_bytes_evenly_over_1_to_n_directories(tmp_path, backend, n_drives):
    engine = make_engine(make_files(tmp_path, n_drives, 4 * MIB), backend, stripe_nbytes=65536)
    arena = Arena(10 * 65536)
    engine.write(arena.address, arena.nbytes, 0).wait(timeout_s=20)
    drives = engine.counters()["drives"]
    assert [drive["written_bytes"] for drive in drives] == [arena.nbytes // n_drives] * n_drives


def test_both_backends_have_the_same_interface(tmp_path):
    """Every call of the engine gives results of the same types, whichever backend is underneath."""
    described = []
    for backend in BACKENDS:
        engine = make_engine(make_files(tmp_path, 1, MIB), backend)
        arena = Arena(MIB)
        shapes = [type(engine.register_buffer(arena.address, MIB)), type(engine.direct)]
        for verb in ("write", "read"):
            ticket = getattr(engine, verb)(arena.address, MIB, 0)
            ticket.wait(timeout_s=20)
            shapes.append(type(ticket))
        counters = engine.counters()
        counters.pop("submit_calls"), counters.pop("in_flight_max")
        described.append((shapes, counters))
        assert engine.backend == backend
        engine.cancel()
        engine.close()
    assert described[0] == described[1]

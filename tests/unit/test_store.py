"""The store: one file a drive and run, preallocated, with a run id and an exclusive lock, removed unless kept."""

from __future__ import annotations

import fcntl
import gc
import glob
import itertools
import os
import pathlib
import re

import pytest

from offload.errors import StoreError
from offload.tiers.host import HostArena
from offload.tiers.storage import Store, leftover_stores
from tests.child import run
from tests.conftest import slow_but

MIB = 1 << 20


def make_store(*directories, nbytes=4 * MIB, keep=False, backend="auto", stripe_nbytes=65536):
    return Store(
        [str(directory) for directory in directories], nbytes, stripe_nbytes=stripe_nbytes, backend=backend,
        direct=True, block_nbytes=65536, queue_depth=8, keep=keep,
    )  # fmt: skip


def files_in(directory):
    return sorted(glob.glob(f"{directory}/*"))


def test_there_is_one_file_for_each_drive_and_run(tmp_path):
    drives = [tmp_path / "a", tmp_path / "b"]
    first, second = make_store(*drives), make_store(*drives)
    for drive in drives:
        assert len(files_in(drive)) == 2
    first.close(), second.close()


def test_the_file_is_preallocated_in_full_before_a_byte_is_written(tmp_path):
    store = make_store(tmp_path, nbytes=16 * MIB)
    status = os.stat(store.paths[0])
    assert status.st_size >= 16 * MIB
    assert status.st_blocks * 512 >= 16 * MIB
    store.close()


def test_extents_are_aligned_disjoint_and_inside_the_file(tmp_path):
    store = make_store(tmp_path, nbytes=MIB)
    ranges = []
    for nbytes in (1, 4096, 5000, 100_000):
        offset = store.allocate(nbytes)
        assert offset % 4096 == 0
        ranges.append((offset, offset + nbytes))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert ranges[-1][1] <= os.path.getsize(store.paths[0])
    with pytest.raises(StoreError, match="is full"):
        store.allocate(MIB)
    store.close()


def test_the_file_name_carries_the_run_id_and_runs_have_different_ones(tmp_path):
    stores = [make_store(tmp_path) for _ in range(5)]
    assert len({store.run_id for store in stores}) == 5
    for store in stores:
        assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", store.run_id)
        assert store.run_id in store.paths[0]
        store.close()


def test_the_file_is_locked_exclusively_while_the_run_lives(tmp_path):
    store = make_store(tmp_path, keep=True)
    with open(store.paths[0], "rb") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        store.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("keep", [False, True])
def test_a_clean_exit_removes_the_file_unless_it_is_kept(tmp_path, keep):
    store = make_store(tmp_path, keep=keep)
    store.close()
    assert (files_in(tmp_path) == []) is not keep
    store.close()


def test_a_store_that_is_forgotten_removes_its_file(tmp_path):
    store = make_store(tmp_path)
    assert files_in(tmp_path)
    del store
    gc.collect()
    assert files_in(tmp_path) == []


MAKE = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_store import make_store
store = make_store(sys.argv[1])
"""


@pytest.mark.parametrize(
    "ending", slow_but([""], ["", "raise RuntimeError('training failed')", "sys.exit(3)"])
)
def test_a_process_that_ends_without_close_removes_the_file(tmp_path, ending):
    run(f"{MAKE}{ending}", tmp_path / "store", pathlib.Path(__file__).parent)
    assert (tmp_path / "store").exists()
    assert files_in(tmp_path / "store") == []


FORK = """
from offload.tiers.host import HostArena
child = os.fork()
if child == 0:
    if sys.argv[3] == "close": store.close()
    sys.exit(0)
_, status = os.waitpid(child, 0)
arena = HostArena(4096)
store.engine.write(arena.address, 4096, 0).wait(10)
print(status, os.path.exists(store.paths[0]))
"""


@pytest.mark.parametrize("ending", slow_but(["close"], ["exit", "close"]))
def test_a_forked_child_neither_hangs_nor_takes_the_parents_store_away(tmp_path, ending):
    status, out, err = run(f"{MAKE}{FORK}", tmp_path / "store", pathlib.Path(__file__).parent, ending)
    assert status == 0, err
    assert out.split() == ["0", "True"]
    assert files_in(tmp_path / "store") == []


KILLED = MAKE + "import signal; os.kill(os.getpid(), signal.SIGKILL)"


def test_what_killed_runs_leave_is_found_and_named_when_space_is_short(tmp_path):
    run(KILLED, tmp_path, pathlib.Path(__file__).parent)
    (left,) = files_in(tmp_path)
    living = make_store(tmp_path)
    assert leftover_stores(str(tmp_path)) == [(left, os.stat(left).st_blocks * 512)]
    with pytest.raises(StoreError, match=r"1 store files of runs that have ended.*rm "):
        make_store(tmp_path, nbytes=1 << 60)
    assert len(files_in(tmp_path)) == 2
    living.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=f"{tmp_path}/file/store: cannot be made"):
        make_store(tmp_path / "file" / "store")


def test_a_second_drive_that_fails_takes_the_first_ones_file_along(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        make_store(tmp_path / "a", tmp_path / "file" / "b")
    assert files_in(tmp_path / "a") == []


def test_a_grown_store_keeps_its_bytes_and_has_room(tmp_path):
    store = make_store(tmp_path / "a", tmp_path / "b", nbytes=MIB)
    arena = HostArena(MIB)
    arena.bytes_tensor.random_(0, 256)
    before = arena.bytes_tensor.clone()
    store.engine.write(arena.address, MIB, store.allocate(MIB)).wait(20)
    store.grow(MIB)
    other = store.allocate(MIB)
    arena.bytes_tensor.zero_()
    store.engine.write(arena.address, MIB, other).wait(20)
    store.engine.read(arena.address, MIB, 0).wait(20)
    assert arena.bytes_tensor.equal(before)
    store.close()


@pytest.mark.fault
@pytest.mark.parametrize("n_drives", [1, 2])
def test_a_file_cut_short_is_noticed_even_when_our_writes_made_it_grow_again(tmp_path, n_drives):
    store = make_store(*[tmp_path / str(i) for i in range(n_drives)], nbytes=MIB)
    store.check_intact()
    arena = HostArena(MIB)
    os.truncate(store.paths[-1], 0)
    store.engine.write(arena.address, MIB, store.allocate(MIB)).wait(20)
    with pytest.raises(StoreError, match=f"{store.paths[-1]}: has been truncated"):
        store.check_intact()
    store.close()


@pytest.mark.fault
@pytest.mark.parametrize("n_drives", [1, 2])
def test_a_file_cut_short_is_noticed_before_the_store_grows_over_it(tmp_path, n_drives):
    store = make_store(*[tmp_path / str(i) for i in range(n_drives)], nbytes=MIB)
    os.truncate(store.paths[-1], 4096)
    with pytest.raises(StoreError, match=f"{store.paths[-1]}: has been truncated"):
        store.grow(MIB)
    with pytest.raises(StoreError, match="has been truncated"):
        store.check_intact()
    store.close()


def test_growing_reserves_only_what_is_new(tmp_path, monkeypatch):
    store = make_store(tmp_path, nbytes=MIB)
    reserved, reserve = [], os.posix_fallocate

    def reserve_and_tell(descriptor, offset, nbytes):
        reserved.append((offset, nbytes))
        reserve(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", reserve_and_tell)
    before = store.file_nbytes
    store.grow(MIB)
    assert reserved == [(before, store.file_nbytes - before)]
    assert os.path.getsize(store.paths[0]) == store.file_nbytes
    store.close()


def test_a_file_system_without_reservation_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    store = make_store(tmp_path)
    assert os.path.getsize(store.paths[0]) >= 4 * MIB
    assert "cannot reserve space" in caplog.text
    store.close()

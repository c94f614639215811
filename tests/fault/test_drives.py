"""Drives that fill up, break or lose our file: an error that names the file, nothing left behind, no wrong number."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import resource
import shutil

import pytest
import torch
from torch import nn

import offload
from offload.errors import StoreError
from offload.tiers import storage
from offload.tiers.host import HostArena
from tests.fault import disks
from tests.fault.training import GIVEN_UP, make_run, parameters_of, steps
from tests.unit.test_store import files_in, make_store

pytestmark = pytest.mark.fault

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB of its own."""
    with disks.in_memory(tmp_path / "disk", 8 * MIB) as place:
        yield place


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(small_disk):
    with pytest.raises(StoreError, match=f"{small_disk}: the store needs 0.02 GB here and 0.01 GB are free"):
        make_store(small_disk, nbytes=16 * MIB)
    assert files_in(small_disk) == []


@pytest.mark.parametrize(("sector_nbytes", "direct"), [(4096, True), (16384, False)])
def test_a_drive_of_any_sector_size_keeps_what_is_written(tmp_path, caplog, sector_nbytes, direct):
    with disks.of_sectors(tmp_path / "disk", tmp_path / "image", 320 * MIB, sector_nbytes) as place:
        store = make_store(place / "s", nbytes=4 * MIB)
        arena = HostArena(2 * MIB)
        arena.bytes_tensor.random_(0, 256)
        before = arena.bytes_tensor[:MIB].clone()
        offset = store.allocate(4096) + 4096
        store.engine.write(arena.address, MIB, offset).wait(20)
        store.engine.sync()
        store.engine.read(arena.address + MIB, MIB, offset).wait(20)
        assert arena.bytes_tensor[MIB:].equal(before)
        assert store.engine.direct is direct
        assert ("no direct I/O of 4096 bytes" in caplog.text) is not direct
        store.close()


def test_a_disk_that_fills_in_the_middle_of_preallocation_is_named_and_left_empty(small_disk, monkeypatch):
    """Another program takes the space between our look at it and our preallocation."""
    look = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: look(path)._replace(free=1 << 40))
    with pytest.raises(
        StoreError, match=rf"{small_disk}/offload-.*: cannot preallocate \d+ bytes: No space left"
    ):
        make_store(small_disk, nbytes=16 * MIB)
    assert files_in(small_disk) == []


def test_a_disk_that_fills_while_the_store_grows_is_named_and_the_store_still_works(small_disk):
    store = make_store(small_disk, nbytes=4 * MIB)
    with pytest.raises(StoreError, match="cannot preallocate"):
        store.grow(16 * MIB)
    assert store.capacity_nbytes == 4 * MIB
    with pytest.raises(StoreError, match="is full"):
        store.allocate(5 * MIB)
    arena = HostArena(MIB)
    store.engine.write(arena.address, MIB, store.allocate(MIB)).wait(20)
    store.close()
    assert files_in(small_disk) == []


@pytest.mark.parametrize("backend", ["uring", "posix"])
def test_a_disk_that_fills_in_the_middle_of_a_write_is_named(small_disk, monkeypatch, backend):
    """A real ENOSPC: the file system cannot reserve space, and the bytes find none."""

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    try:
        store = make_store(small_disk, nbytes=6 * MIB, backend=backend)
    except OSError as error:
        pytest.skip(f"{backend} is refused here: {error}")
    with open(small_disk / "others", "wb") as other:
        other.write(bytes(5 * MIB))
    arena = HostArena(6 * MIB)
    arena.bytes_tensor.fill_(1)
    with pytest.raises(OSError, match=f"of {store.paths[0]}") as caught:
        store.engine.write(arena.address, 6 * MIB, 0).wait(20)
    assert caught.value.errno == errno.ENOSPC
    assert "add a storage directory" in str(caught.value)
    store.close()
    assert [os.path.basename(path) for path in files_in(small_disk)] == ["others"]


@pytest.fixture
def breakable_drive(tmp_path):
    """A real file system on a loop device; `cut` takes the medium away under it."""
    image = tmp_path / "image"
    with disks.on_a_file(tmp_path / "drive", "ext4", image, 64 * MIB) as place:
        yield place, lambda: os.truncate(image, 0)


@pytest.mark.parametrize("backend", ["uring", "posix"])
def test_a_vanished_drive_is_reported_with_its_path_and_nobody_hangs(breakable_drive, backend):
    place, cut = breakable_drive
    try:
        store = make_store(place, nbytes=16 * MIB, backend=backend)
    except OSError as error:
        pytest.skip(f"{backend} is refused here: {error}")
    arena = HostArena(16 * MIB)
    arena.bytes_tensor.fill_(7)
    store.engine.write(arena.address, 16 * MIB, 0).wait(20)
    cut()
    with pytest.raises(OSError, match=f"of {store.paths[0]}: ") as caught:
        store.engine.read(arena.address, 16 * MIB, 0).wait(20)
    assert caught.value.errno == errno.EIO
    assert "offset" in str(caught.value)
    store.close()


def test_a_store_file_truncated_behind_our_back_ends_training_with_its_name(tmp_path):
    model, optimizer = make_run(tmp_path)
    steps(model, optimizer, 1)
    (path,) = glob.glob(f"{tmp_path}/*.store")
    os.truncate(path, 0)
    with pytest.raises(GIVEN_UP, match=path):
        steps(model, optimizer, 1)
    with contextlib.suppress(*GIVEN_UP):
        model.offload.close()
    assert files_in(tmp_path) == []


def test_a_store_file_unlinked_behind_our_back_changes_no_number(tmp_path):
    expected = steps(*make_run(tmp_path / "a"), 3)
    model, optimizer = make_run(tmp_path / "b")
    (path,) = glob.glob(f"{tmp_path}/b/*.store")
    os.unlink(path)
    got = steps(model, optimizer, 3)
    model.offload.close()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_run_whose_store_file_was_deleted_says_so_once_and_can_be_saved(tmp_path, caplog):
    expected = steps(*make_run(tmp_path / "a"), 2)
    model, optimizer = make_run(tmp_path / "b")
    (path,) = glob.glob(f"{tmp_path}/b/*.store")
    os.unlink(path)
    steps(model, optimizer, 2)
    assert caplog.text.count(f"{path}: has been deleted by another program") == 1
    offload.save(model, str(tmp_path / "saved"))
    model.offload.close()
    assert_goes_on_from(tmp_path, expected)


def test_a_durable_run_whose_store_file_was_deleted_is_refused_between_two_steps_and_can_be_saved(tmp_path):
    expected = steps(*make_run(tmp_path / "a"), 2)
    model, optimizer = make_run(tmp_path / "b", durability="step")
    steps(model, optimizer, 2)
    (path,) = glob.glob(f"{tmp_path}/b/*.store")
    os.unlink(path)
    with pytest.raises(StoreError, match=rf"{path}: has been deleted .*offload\.save.*offload\.resume"):
        steps(model, optimizer, 1)
    offload.save(model, str(tmp_path / "saved"))
    model.offload.close(remove=True)
    assert_goes_on_from(tmp_path, expected)


def assert_goes_on_from(tmp_path, expected):
    model, _ = make_run(tmp_path / "c")
    offload.resume(model, str(tmp_path / "saved"))
    got = parameters_of(model)
    assert all(torch.equal(got[name], values) for name, values in expected.items())
    model.offload.close()


def test_a_full_disk_leaves_the_users_model_alone(small_disk, monkeypatch):
    """wrap fails; the model has its parameters, and fits elsewhere."""
    look = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: look(path)._replace(free=1 << 40))
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    budgets = {"device_memory": "4MB", "host_memory": "1MB", "chunk_elements": 4096}
    with pytest.raises(StoreError, match="No space left"):
        offload.wrap(model, optimizer, storage=[str(small_disk)], **budgets)
    assert files_in(small_disk) == []
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert storage.leftover_stores(str(small_disk)) == []


def test_a_limit_on_the_size_of_files_is_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(
            StoreError, match=r"File too large: raise the limit .*ulimit -f.*add another directory"
        ):
            make_run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []

"""A file system that is really full in the middle of a step: what is missing is said, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from offload.errors import CheckpointError, OffloadError
from tests.fault import disks
from tests.fault.test_checkpoint import assert_same_state
from tests.fault.trajectory import Run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

MIB = 1 << 20
N_STEPS = 6


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(tmp_path, request):
    """A file system of 24 MiB, of its own."""
    place = tmp_path / "disk"
    if request.param == "tmpfs":
        made = disks.in_memory(place, 24 * MIB)
    else:
        options = ("-O", "^has_journal", "-m", "0")
        made = disks.on_a_file(place, "ext4", tmp_path / "image", 24 * MIB, *options)
    with made:
        yield place


def durable(place):
    run = Run(storage=[str(place / "store")], durability="step", head_width=160)
    run.model.offload.track(**run.tracked)
    return run


def fill_up(disk, leave_nbytes):
    """Another program takes all of the room but this."""
    with open(disk / "other", "wb", buffering=0) as file:
        while (room := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave_nbytes) > 0:
            file.write(bytes(min(room, 1 << 16)))


@pytest.mark.parametrize("leave_nbytes", [0, 600_000])
def test_a_disk_that_is_full_in_the_middle_of_a_step_costs_that_step_only(
    disk, tmp_path, monkeypatch, leave_nbytes
):
    """The file system cannot reserve space, so that blocks are taken as they are written; the second set of extents
    has none yet when another program fills the disk."""
    still = Run(storage=[str(tmp_path / "still")], head_width=160)
    losses = still.steps(N_STEPS)
    expected = still.save(tmp_path / "expected")
    still.close()

    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", cannot)
        run = durable(disk)
        fill_up(disk, leave_nbytes)
        with pytest.raises((OffloadError, OSError)) as caught:
            run.steps(N_STEPS)
        said = f"{caught.value} {caught.value.__cause__}"
        assert f"{disk}/store/offload-" in said
        assert "No space left on device" in said
        assert "free space on this drive" in said
        assert "bytes at offset" in said
        done = len(run.losses)
        assert run.losses == losses[:done]
        with contextlib.suppress(OffloadError, OSError):  # its updates have failed
            run.close()
    os.unlink(disk / "other")
    after = durable(disk)
    try:
        resumed = after.resume(disk / "store").step
    except CheckpointError as error:
        assert "no step had been committed" in str(error) or "holds no checkpoint" in str(error)
        resumed = 0
    assert resumed >= done - 1
    assert after.steps(N_STEPS - resumed) == losses[resumed:]
    assert_same_state(after.save(tmp_path / "after"), expected)
    after.model.offload.close(remove=True)

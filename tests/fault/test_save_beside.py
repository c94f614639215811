"""A save beside training: the checkpoint is that of its step boundary, training gives the numbers it gives without."""

from __future__ import annotations

import itertools
import os
import threading
import time

import pytest
import torch

import offload
from offload.checkpoint.copying import StreamingCopy
from offload.errors import StoreError
from tests.child import end, start
from tests.fault import disks
from tests.fault.test_checkpoint import assert_same_state
from tests.fault.training import IN_MEMORY
from tests.fault.trajectory import Run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

PLACEMENTS = {
    "storage": {},
    "host": {"host_memory": 10**8, "device_memory": 10**8},
    "half in host": {"host_memory": 400_000},
    "deferred": {"max_grad_norm": 1e9},
    "emulated": {"device": "emulated", "host_memory": 10**8, "device_memory": 10**8},
    "aside": {"step_aside": "always", "host_memory": 10**8, "device_memory": 10**8},
    "aside on the device": {"device": "emulated", "step_aside": "always", "device_memory": 10**8},
    "on the device": {"device": "emulated", "device_memory": 10**8, "states_on_device": 10**6},
}
LEVELS = ["checkpoint", "step"]
FAST = [("storage", "checkpoint"), ("storage", "step"), ("host", "checkpoint")]
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(PLACEMENTS, LEVELS)
    if case not in (("aside", "step"), ("aside on the device", "step"), ("on the device", "step"))
]


def make(place, placement, level):
    run = Run(storage=[str(place)], durability=level, head_width=160, **PLACEMENTS[placement])
    run.model.offload.track(**run.tracked)
    return run


@pytest.fixture
def slow_copy(monkeypatch):
    """Every chunk takes a while to be copied, so that training overtakes the save wherever it may."""
    original = StreamingCopy.add

    def slow(self, item):
        if threading.current_thread().name == "offload-save":
            time.sleep(0.002)
        original(self, item)

    monkeypatch.setattr(StreamingCopy, "add", slow)


@pytest.mark.parametrize(("placement", "level"), CASES)
def test_what_is_saved_while_training_goes_on_is_the_state_of_the_boundary(
    tmp_path, slow_copy, placement, level
):
    still = make(tmp_path / "still", placement, level)
    still.steps(2)
    expected = still.save(tmp_path / "expected")
    losses = still.steps(4)
    still.model.offload.close(remove=True)
    run = make(tmp_path / "store", placement, level)
    run.steps(2)
    path = run.save(tmp_path / "saved", wait=False)
    began = not os.path.exists(path)
    assert run.steps(3) == losses[:3]
    run.model.offload.wait_saved()
    assert began
    assert_same_state(path, expected)
    assert run.steps(1) == losses[3:]
    run.model.offload.close(remove=True)
    again = make(tmp_path / "again", placement, level)
    assert again.resume(tmp_path / "saved").step == 2
    assert again.steps(4) == losses
    again.model.offload.close(remove=True)


def test_a_durable_update_waits_for_no_copy_before_the_second_step(tmp_path, monkeypatch):
    """With two sides the first step after a save overwrites nothing of it; the second has to wait."""
    run = make(tmp_path / "store", "storage", "step")
    run.steps(2)
    release = threading.Event()
    original = StreamingCopy.add

    def held(self, item):
        release.wait(30)
        original(self, item)

    monkeypatch.setattr(StreamingCopy, "add", held)
    path = run.save(tmp_path / "saved", wait=False)
    run.step()
    assert not os.path.exists(path)
    timer = threading.Timer(0.3, release.set)
    timer.start()
    begin_s = time.monotonic()
    run.step()
    assert time.monotonic() - begin_s > 0.2
    assert run.model.offload.last_step["stall_s"]["save"] > 0.2
    timer.join()
    run.model.offload.close(remove=True)
    assert os.path.exists(path)


def test_a_save_beside_training_that_fails_is_reported_and_leaves_what_was_there(
    tmp_path, monkeypatch, caplog
):
    still = make(tmp_path / "still", "storage", "checkpoint")
    losses = still.steps(5)
    still.close()
    run = make(tmp_path / "store", "storage", "checkpoint")
    assert run.steps(1) == losses[:1]
    first = run.save(tmp_path / "saved")
    with monkeypatch.context() as patch:
        patch.setattr(StreamingCopy, "finish", lambda _: (_ for _ in ()).throw(OSError(5, "broken")))
        run.save(tmp_path / "saved", wait=False)
        assert run.steps(2) == losses[1:3]
        with pytest.raises(StoreError, match=r"could not be written: .*broken.*those before it are intact"):
            run.model.offload.wait_saved()
    assert "training goes on" in caplog.text
    assert sorted(os.listdir(tmp_path / "saved")) == [".lock", os.path.basename(first)]
    assert run.steps(2) == losses[3:]
    second = run.save(tmp_path / "saved", wait=False)
    run.close()
    assert os.path.exists(second)


KILLED = """
import sys, time
from offload.checkpoint.copying import StreamingCopy
from tests.fault.trajectory import Run
run = Run(storage=[sys.argv[1] + "/store"])
run.steps(2)
run.save(sys.argv[1] + "/saved")
original = StreamingCopy.add
def slow(self, item):
    time.sleep(0.01)
    original(self, item)
StreamingCopy.add = slow
run.step()
run.save(sys.argv[1] + "/saved", wait=False)
print("saving", flush=True)
run.steps(10000)
"""


@pytest.mark.slow
def test_a_kill_while_a_save_goes_on_beside_training_leaves_the_checkpoint_before(tmp_path):
    child = start(KILLED, tmp_path)
    assert child.stdout.readline() == "saving\n"
    time.sleep(0.05)
    child.kill()
    end(child)
    found = offload.inspect(str(tmp_path / "saved"), verify=True)
    assert (found.step, found.damage) == (2, [])
    still = Run(storage=[str(tmp_path / "still")])
    losses = still.steps(4)
    still.close()
    run = Run(storage=[str(tmp_path / "store")])
    assert run.resume(tmp_path / "saved").step == 2
    assert run.steps(2) == losses[2:]
    run.close()


@pytest.fixture(params=["btrfs", "xfs"])
def sharing_disk(tmp_path, request):
    """A file system that can share extents, on a file of its own."""
    with disks.on_a_file(tmp_path / "disk", request.param, tmp_path / "image", 400 << 20) as place:
        yield place


@pytest.mark.slow
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_where_extents_can_be_shared_a_checkpoint_takes_no_room_until_training_changes_them(
    sharing_disk, tmp_path, level, wait
):
    def used_nbytes():
        os.sync()
        free = os.statvfs(sharing_disk)
        return (free.f_blocks - free.f_bfree) * free.f_frsize

    settings = {"durability": level, "layers": 40, "head_width": 160}
    still = Run(storage=[str(tmp_path / "still")], **settings)
    still.steps(2)
    expected = still.save(tmp_path / "expected")
    losses = still.steps(2)
    still.model.offload.close(remove=True)
    run = Run(storage=[str(sharing_disk / "store")], **settings)
    run.steps(2)
    run.model.offload.flush()
    before = used_nbytes()
    path = run.save(sharing_disk / "saved", wait=wait)
    run.model.offload.wait_saved()
    nbytes = os.path.getsize(os.path.join(path, "extents.bin"))
    assert nbytes > 2 << 20
    assert used_nbytes() - before < nbytes // 4
    assert run.steps(2) == losses
    assert_same_state(path, expected)
    run.model.offload.close(remove=True)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_what_a_loop_writes_to_parameters_while_a_checkpoint_is_written_is_not_in_it(
    tmp_path, slow_copy, device
):
    """Where nothing is streamed a loop may clamp its weights between two steps, as in memory."""

    def make_aside():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
        made = torch.optim.AdamW(model.parameters())
        return offload.wrap(model, made, device=device, chunk_elements=2048, step_aside="always", **IN_MEMORY)

    model, optimizer = make_aside()
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    expected = model.state_dict()
    offload.save(model, str(tmp_path), wait=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-1e-3, 1e-3)
    model.offload.wait_saved()
    again, _ = make_aside()
    offload.resume(again, str(tmp_path))
    found = again.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for each in (model, again):
        each.offload.close()

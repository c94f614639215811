"""Save and resume: the same bits as the run that never stopped, into whatever placement; atomic, bounded, locked."""

from __future__ import annotations

import os
import pathlib
import shutil
import stat
import sys
import threading
import time

import pytest
import torch

import offload
from offload._C import Ticket
from offload.checkpoint.copying import StreamingCopy
from offload.checkpoint.read import ChunkReader, read_manifest
from offload.checkpoint.save import KIND
from offload.errors import CheckpointError, ConfigError, CorruptError, StoreError, UsageError
from offload.tiers.encoding import dtype_named
from offload.tiers.manifest import frame
from tests.child import end, start
from tests.drive_order import recorded
from tests.fault.trajectory import Run

pytestmark = pytest.mark.fault

PLACEMENTS = {
    "storage": {"storage": ["a"]},
    "three drives": {"storage": ["a", "b", "c"], "stripe_nbytes": 8192, "chunk_elements": 4096},
    "host": {"host_memory": "100MB", "device_memory": "100MB"},
    "half in host": {"storage": ["a"], "host_memory": "400KB"},
    "aside": {"step_aside": "always", "host_memory": "100MB", "device_memory": "100MB"},
    "aside on the device": {"device": "emulated", "step_aside": "always", "device_memory": "100MB"},
    "deferred": {"storage": ["a"], "max_grad_norm": 1e9},
    "emulated": {"storage": ["a"], "device": "emulated", "host_memory": "100MB", "device_memory": "100MB"},
    "posix": {"storage": ["a"], "backend": "posix", "direct_io": False},
    "on the device": {"device": "emulated", "device_memory": "100MB", "states_on_device": "1MB"},
}


def make(tmp_path, placement, **more):
    settings = {**PLACEMENTS[placement], **more}
    if "storage" in settings:
        settings["storage"] = [str(tmp_path / name) for name in settings["storage"]]
    return Run(**settings)


def whole_state(path):
    """(parameter plane, lo and moments) of every parameter, whatever the layout of the checkpoint."""
    manifest = read_manifest(path)
    held = {}
    with ChunkReader(manifest, [os.path.join(path, name) for name in manifest.files]) as reader:
        for block in manifest.blocks:
            for buffer in block.buffers:
                split = buffer.dtype == "bfloat16"
                planes = [[], [], [], []]
                for index in range(-(-buffer.n_elements // manifest.chunk_elements)):
                    param, record = reader.chunk(buffer, index)
                    n = reader.elements(buffer, index)
                    planes[0].append(param.view(dtype_named(buffer.dtype)).clone())
                    lo = 2 * n if split else 0
                    planes[1].append(record[:lo].view(torch.int16).clone())
                    planes[2].append(record[lo : lo + 4 * n].view(torch.float32).clone())
                    planes[3].append(record[lo + 4 * n :].view(torch.float32).clone())
                joined = [torch.cat(plane) for plane in planes]
                for p in buffer.parameters:
                    held[p.name] = [plane[p.start : p.start + p.numel] for plane in joined if plane.numel()]
    return held, manifest.training


def assert_same_state(one, other):
    (mine, my_training), (theirs, their_training) = whole_state(one), whole_state(other)
    assert mine.keys() == theirs.keys()
    for name, planes in mine.items():
        for plane, expected in zip(planes, theirs[name], strict=True):
            assert torch.equal(plane, expected), name
    assert my_training == their_training


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Saved after 2 steps, and after 5."""
    place = tmp_path_factory.mktemp("uninterrupted")
    run = Run(storage=[str(place / "store")])
    run.steps(2)
    early = run.save(place / "early")
    losses = run.steps(3)
    late = run.save(place / "late")
    run.close()
    return early, losses, late


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_resumed_run_gives_the_bits_of_the_uninterrupted_one_in_any_placement(
    tmp_path, uninterrupted, placement
):
    early, losses, late = uninterrupted
    run = make(tmp_path, placement)
    assert run.resume(early) == offload.Resumed(early, 2)
    assert run.steps(3) == losses
    assert_same_state(run.save(tmp_path / "again"), late)
    run.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_any_placement_saves_is_the_same_state(tmp_path, uninterrupted, placement):
    early, losses, _ = uninterrupted
    run = make(tmp_path, placement)
    run.steps(2)
    path = run.save(tmp_path / "saved")
    assert run.steps(3) == losses  # saving changes nothing
    run.close()
    assert_same_state(path, early)


@pytest.mark.parametrize(
    ("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_the_masters_survive_a_change_of_the_dtype_computed_in(tmp_path, before, after):
    """fp32 masters are held in one plane or in two: their values are the same."""
    first = Run(dtype=before, storage=[str(tmp_path / "a")])
    first.steps(2)
    one = first.save(tmp_path / "one")
    first.close()
    second = Run(dtype=after, storage=[str(tmp_path / "b")])
    second.resume(one)
    two = second.save(tmp_path / "two")
    second.close()
    mine, theirs = whole_state(one)[0], whole_state(two)[0]
    for name in mine:
        assert torch.equal(master(mine[name]), master(theirs[name]))
        assert all(torch.equal(a, b) for a, b in zip(mine[name][-2:], theirs[name][-2:], strict=True))


def master(planes):
    if len(planes) == 3:
        return planes[0]
    hi, lo = planes[0].view(torch.int16).to(torch.int32) << 16, planes[1].to(torch.int32)
    return (hi + lo).view(torch.float32)


def test_saving_inside_a_step_is_refused_and_says_when(tmp_path):
    run = Run(storage=[str(tmp_path / "a")])
    run.steps(1)
    run.model(run.data.next()).square().mean().backward()
    with pytest.raises(UsageError, match=r"after step\(\)"):
        run.save(tmp_path / "saved")
    run.optimizer.step()
    run.save(tmp_path / "saved")
    run.close()
    with pytest.raises(UsageError, match="closed"):
        run.save(tmp_path / "saved")


def test_only_the_owner_can_read_a_checkpoint(tmp_path):
    run = Run(storage=[str(tmp_path / "a")])
    path = run.save(tmp_path / "saved")
    run.close()
    assert stat.S_IMODE(os.stat(tmp_path / "saved").st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert {stat.S_IMODE(os.stat(f"{path}/{name}").st_mode) for name in os.listdir(path)} == {0o600}


def test_keep_last_keeps_the_newest_and_a_step_saved_again_is_newer(tmp_path):
    run = Run(storage=[str(tmp_path / "a")])
    paths = []
    for _ in range(3):
        run.steps(1)
        paths.append(run.save(tmp_path / "saved", keep_last=2))
    again = run.save(tmp_path / "saved", keep_last=2)
    assert run.resume(tmp_path / "saved").path == again
    run.close()
    assert sorted(os.listdir(tmp_path / "saved")) == [".lock", *map(os.path.basename, (paths[2], again))]
    with pytest.raises(ConfigError, match="keep_last=0"):
        offload.save(run.model, str(tmp_path), keep_last=0)


def test_a_save_stays_where_an_earlier_run_left_later_steps_and_says_what_resume_would_take(tmp_path, caplog):
    earlier = Run(storage=[str(tmp_path / "a")])
    earlier.steps(3)
    later = earlier.save(tmp_path / "saved")
    earlier.close()
    run = Run(storage=[str(tmp_path / "a")])
    run.steps(1)
    first = run.save(tmp_path / "saved", keep_last=2)
    assert "step-000000003, which is of a later step" in caplog.text
    assert os.path.isdir(first)
    assert os.path.isdir(later)
    caplog.clear()
    run.steps(1)
    second = run.save(tmp_path / "saved", keep_last=1)
    assert run.resume(tmp_path / "saved").path == second
    assert sorted(os.listdir(tmp_path / "saved")) == [".lock", os.path.basename(second)]
    assert caplog.text == ""
    run.close()


def test_a_failed_save_leaves_what_was_there_and_training_goes_on(tmp_path, uninterrupted, monkeypatch):
    _, losses, _ = uninterrupted
    run = Run(storage=[str(tmp_path / "a")])
    run.steps(2)
    path = run.save(tmp_path / "saved")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(
            StoreError, match=r"takes \d+ bytes here and \d+ are free, \d+ too few.*keep_last"
        ):
            run.save(tmp_path / "saved")
    with monkeypatch.context() as patch:
        patch.setattr(StreamingCopy, "finish", lambda _: (_ for _ in ()).throw(OSError(5, "broken")))
        with pytest.raises(OSError, match="broken"):
            run.save(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == [".lock", os.path.basename(path)]
    assert run.steps(3) == losses
    run.close()


@pytest.mark.parametrize("wait", [True, False])
def test_everything_in_a_checkpoint_is_on_the_drive_before_it_gets_its_name(tmp_path, monkeypatch, wait):
    """Power may go at any instant: a name must never be there before what it names."""
    run = Run(storage=[str(tmp_path / "a")])
    run.steps(1)
    run.save(tmp_path / "saved")
    done = recorded(monkeypatch)
    run.save(tmp_path / "saved", wait=wait)
    run.model.offload.wait_saved()
    partial = next(name for what, name in done if what == "rename")
    at = done.index(("rename", partial))
    assert {("sync", "extents.bin"), ("sync", "manifest.jsonl"), ("sync", partial)} == set(done[:at])
    assert done[at + 1] == ("sync", "saved")
    run.close()


HOLDS = """
import sys, time
from offload.checkpoint.directory import locked
with locked(sys.argv[1], exclusive=True):
    print("held", flush=True)
    time.sleep(60)
"""


class OneReadFails:
    """An engine whose first read fails at once; the others come late."""

    def __init__(self, engine):
        self._engine, self._gate, self.tickets = engine, Ticket(), []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def read(self, address, nbytes, offset):
        if not self.tickets:
            threading.Timer(0.2, self._gate.complete).start()
            self.tickets.append(Ticket())
            self.tickets[0].complete("this read fails")
        else:
            self.tickets.append(self._engine.read(address, nbytes, offset, after=self._gate))
        return self.tickets[-1]


def test_nothing_is_read_into_staging_any_more_when_a_save_has_failed(tmp_path, monkeypatch):
    """It is the update pipeline's, and training goes on."""
    run = Run(storage=[str(tmp_path / "s")], chunk_buffers=4)
    run.steps(1)
    held = []

    def made(source, target, ring):
        held.append(OneReadFails(source))
        return StreamingCopy(held[0], target, ring)

    # The package has the function under the module's name.
    monkeypatch.setattr(sys.modules["offload.checkpoint.save"], "StreamingCopy", made)
    with pytest.raises(OSError, match="this read fails"):
        run.save(tmp_path / "c")
    assert len(held[0].tickets) > 1
    assert all(ticket.done() for ticket in held[0].tickets)
    monkeypatch.undo()
    run.close()


def test_a_piece_is_read_into_again_only_when_all_reads_into_it_have_ended(tmp_path, uninterrupted):
    """One has failed while the other goes on: `inspect` reads the next chunk all the same."""
    manifest = read_manifest(uninterrupted[2])
    path = pathlib.Path(uninterrupted[2]) / manifest.files[0]
    buffer = next(b for x in manifest.blocks for b in x.buffers if b.trainable)
    waited = []

    class Fails:
        def wait(self):
            raise OSError(5, "this read fails")

    class GoesOn:
        def wait(self):
            waited.append(self)

    with ChunkReader(manifest, [str(path)]) as reader:
        reader.chunk(buffer, 0)
        slot = reader._held.index((id(buffer), 0))
        reader._tickets[slot] = [Fails(), GoesOn()]
        with pytest.raises(CorruptError, match="this read fails"):
            reader.chunk(buffer, 0)
        assert len(waited) == 1


def test_a_living_owner_is_named_and_a_dead_ones_lock_and_rest_are_taken_over(tmp_path):
    place = tmp_path / "saved"
    place.mkdir()
    run = Run(storage=[str(tmp_path / "a")])
    child = start(HOLDS, place)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f"in use by process {child.pid}"):
        run.save(place)
    child.kill()
    end(child)
    (place / ".partial-1-7").mkdir()
    (place / ".partial-1-7" / "extents.bin").write_bytes(bytes(9))
    run.save(place)
    run.close()
    assert sorted(os.listdir(place)) == [".lock", "step-000000000"]


def test_memory_while_saving_is_the_pipelines_own(tmp_path, monkeypatch):
    """No second copy of the state in DRAM: every byte passes through the chunk buffers that training has."""
    run = Run(storage=[str(tmp_path / "a")])
    staging = run.model.offload.parts.resources.staging
    rings = []
    original = StreamingCopy.__init__

    def spy(self, source, target, ring):
        rings.append(ring)
        original(self, source, target, ring)

    monkeypatch.setattr(StreamingCopy, "__init__", spy)
    run.save(tmp_path / "saved")
    run.close()
    begin, end_ = staging.data_ptr(), staging.data_ptr() + staging.numel()
    assert all(begin <= piece.data_ptr() and piece.data_ptr() + piece.numel() <= end_ for piece in rings[0])


def test_every_flipped_byte_is_found_and_named(tmp_path, uninterrupted):
    """One bit in any page of the extents: resume refuses, inspect lists it."""
    early, _, _ = uninterrupted
    extents = f"{early}/extents.bin"
    whole = pathlib.Path(extents).read_bytes()
    used = [
        (e.offset, e.nbytes)
        for b in read_manifest(early).blocks
        for f in b.buffers
        for e in (f.param, f.state)
    ]
    place = tmp_path / "copy"
    place.mkdir()
    (place / "manifest.jsonl").write_bytes(pathlib.Path(early, "manifest.jsonl").read_bytes())
    run = Run(storage=[str(tmp_path / "a")])
    for offset, nbytes in used:
        at = offset + nbytes // 2
        (place / "extents.bin").write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(CorruptError, match=r"extents\.bin.*CRC32C.*resume from another"):
            run.resume(place)
        assert len(offload.inspect(str(place), verify=True).damage) == 1
    (place / "extents.bin").write_bytes(whole[:-4096])
    with pytest.raises(CorruptError, match="cut short"):
        run.resume(place)
    assert offload.inspect(str(early), verify=True).damage == []
    run.close()


def test_another_model_is_named_by_its_first_difference(tmp_path, uninterrupted):
    early, _, _ = uninterrupted
    other = Run(layers=2, storage=[str(tmp_path / "a")])
    with pytest.raises(CheckpointError, match=r"this one has no parameter inner\.layers\.2"):
        other.resume(early)
    other.close()
    more = Run(layers=4, storage=[str(tmp_path / "a")])
    with pytest.raises(CheckpointError, match=r"it has no parameter inner\.layers\.3"):
        more.resume(early)
    more.close()


def test_a_manifest_that_says_it_is_of_another_model_than_it_describes_is_refused(tmp_path, uninterrupted):
    early, _, _ = uninterrupted
    manifest = read_manifest(early)
    place = tmp_path / "copy"
    shutil.copytree(early, place)
    manifest = manifest.model_copy(update={"fingerprint": "0" * len(manifest.fingerprint)})
    (place / "manifest.jsonl").write_bytes(frame(KIND, manifest.model_dump_json()))
    run = Run(storage=[str(tmp_path / "a")])
    with pytest.raises(CheckpointError, match="it has been edited"):
        run.resume(place)
    run.close()


def test_what_cannot_say_where_it_is_cannot_be_tracked(tmp_path, uninterrupted):
    run = Run(storage=[str(tmp_path / "a")])
    with pytest.raises(UsageError, match="list_iterator without state_dict"):
        offload.save(run.model, str(tmp_path / "saved"), state={"data": iter([1])})
    with pytest.raises(CheckpointError, match="has no state of sampler"):
        offload.resume(run.model, uninterrupted[0], state={"sampler": run.data})
    run.close()


def test_an_empty_directory_says_so(tmp_path):
    run = Run(storage=[str(tmp_path / "a")])
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*offload\.save"):
        run.resume(tmp_path)
    run.close()


SAVES = """
import sys
from tests.fault.trajectory import Run
run = Run(storage=[sys.argv[1] + "/store"])
run.steps(1)
run.save(sys.argv[1] + "/saved")
print("saved", flush=True)
while True:
    run.save(sys.argv[1] + "/saved", keep_last=2)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_saving_leaves_complete_checkpoints_only(tmp_path):
    child = start(SAVES, tmp_path)
    assert child.stdout.readline() == "saved\n"
    time.sleep(0.013)
    child.kill()
    end(child)
    found = offload.inspect(str(tmp_path / "saved"), verify=True)
    assert found.damage == []
    assert found.step == 1

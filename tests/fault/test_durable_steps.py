"""Durability `step`: every step is committed or leaves no trace, whatever fails; a dead run's store is taken over."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import offload
from offload._C import Engine
from offload.errors import CheckpointError, ConfigError, CorruptError, OffloadError, StoreError, UsageError
from offload.runtime.commits import StepCommits
from offload.tiers import storage
from tests.child import end, start
from tests.conftest import slow_but
from tests.fault.test_checkpoint import assert_same_state
from tests.fault.training import inject, parameters_of
from tests.fault.trajectory import Run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

MODES = {
    "backward": {},
    "deferred": {"max_grad_norm": 1e9},
    "in host memory": {"host_memory": 10**8, "device_memory": 10**8},
    "emulated": {"device": "emulated"},
    "two drives": {"stripe_nbytes": 8192},
}


def durable(place, **settings):
    """A run whose every step is committed, with all that it tracks."""
    drives = [str(place), f"{place}-two"] if "stripe_nbytes" in settings else [str(place)]
    run = Run(storage=drives, durability="step", **settings)
    run.model.offload.track(**run.tracked)
    return run


@pytest.fixture(scope="module")
def ideal(tmp_path_factory):
    """Losses of 6 steps, and the state after them, without any durability."""
    place = tmp_path_factory.mktemp("ideal")
    run = Run(storage=[str(place / "store")])
    losses = run.steps(6)
    path = run.save(place / "saved")
    run.close()
    return losses, path


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_run_goes_on_with_the_bits_it_would_have_had(tmp_path, ideal, mode):
    losses, path = ideal
    first = durable(tmp_path / "d", **MODES[mode])
    assert first.steps(3) == losses[:3]
    first.close()
    second = durable(tmp_path / "d", **MODES[mode])
    assert second.resume(tmp_path / "d").step == 3
    assert second.steps(3) == losses[3:]
    assert_same_state(second.save(tmp_path / "saved"), path)
    second.model.offload.close(remove=True)
    assert os.listdir(tmp_path / "d") == []


def test_a_durable_run_may_end_in_another_level_and_placement(tmp_path, ideal):
    losses, path = ideal
    first = durable(tmp_path / "d")
    first.steps(3)
    first.close()
    kept = sorted(os.listdir(tmp_path / "d"))
    second = Run(step_aside="always", host_memory=10**8, device_memory=10**8)
    second.resume(tmp_path / "d")
    assert second.steps(3) == losses[3:]
    assert_same_state(second.save(tmp_path / "saved"), path)
    second.close()
    assert sorted(os.listdir(tmp_path / "d")) == kept  # it is the only durable copy still


def poison(run, name="layers.1.linear.bias"):
    """Let the next backward make one gradient infinite."""
    handles = []

    def hook(grad):
        handles[0].remove()
        return torch.full_like(grad, float("inf"))

    parameter = run.model.inner.get_parameter(name)
    handles.append(parameter.register_hook(hook))


@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_an_infinite_gradient_is_discarded_without_a_trace(tmp_path, mode, caplog):
    """Parameters, moments and step counts are those of the step before, in whichever tier they are."""
    run = durable(tmp_path / "d", **MODES[mode])
    for _ in range(2):
        run.steps(2)
        before = run.save(tmp_path / "saved")
        poison(run)
        run.step()
        after = run.save(tmp_path / "saved")
        assert_same_blocks(before, after)
        assert run.model.offload.last_step["discarded"]
    assert run.optimizer.discarded_steps == 2
    assert "is discarded" in caplog.text
    losses = run.steps(2)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert not run.model.offload.last_step["discarded"]
    run.close()
    again = durable(tmp_path / "d", **MODES[mode])
    assert again.resume(tmp_path / "d").step == 8
    again.model.offload.close(remove=True)


def assert_same_blocks(one, other):
    from tests.fault.test_checkpoint import whole_state

    (mine, _), (theirs, _) = whole_state(one), whole_state(other)
    for name, planes in mine.items():
        for plane, expected in zip(planes, theirs[name], strict=True):
            assert torch.equal(plane, expected), name
    manifests = [offload.checkpoint.read.read_manifest(path) for path in (one, other)]
    steps = [{name: p.step for name, (_, p) in m.parameters().items()} for m in manifests]
    assert steps[0] == steps[1]


def test_a_clip_that_trips_after_updates_have_run_discards_the_step(tmp_path):
    run = durable(tmp_path / "d", update="backward", max_grad_norm=1e-6)
    before = run.save(tmp_path / "saved")
    run.steps(2)
    assert run.optimizer.discarded_steps == 2
    assert float(run.optimizer.grad_norm) > 1e-6
    assert_same_blocks(before, run.save(tmp_path / "saved"))
    run.model.offload.close(remove=True)
    with pytest.raises(ConfigError, match="durability='step', which discards"):
        Run(storage=[str(tmp_path / "d")], update="backward", max_grad_norm=1.0, device_memory=1)


def test_a_first_step_that_is_discarded_leaves_the_initial_state(tmp_path):
    run = durable(tmp_path / "d", host_memory=10**8, device_memory=10**8)
    before = run.save(tmp_path / "saved")
    poison(run)
    run.step()
    assert_same_blocks(before, run.save(tmp_path / "saved"))
    run.model.offload.close(remove=True)


def step_without_blocks(run):
    """Of a loss that no block takes part in."""
    inner, x = run.model.inner, run.data.next().to(run.model.dtype)
    inner.head(inner.embed(x)).float().square().mean().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


@pytest.mark.parametrize("limit", [{"update": "backward", "max_grad_norm": 1e-6}, {}], ids=str)
def test_a_first_step_that_no_block_takes_part_in_is_discarded_and_committed_like_others(tmp_path, limit):
    settings = {"host_memory": 10**8, "device_memory": 10**8, **limit}
    run = durable(tmp_path / "d", **settings)
    before = parameters_of(run.model)
    step_without_blocks(run)
    after = parameters_of(run.model)
    assert run.optimizer.discarded_steps == len(limit) // 2
    assert all(torch.equal(after[name], before[name]) for name in before) == bool(limit)
    run.close()
    again = durable(tmp_path / "d", **settings)
    assert again.resume(tmp_path / "d").step == 1
    kept = parameters_of(again.model)
    assert all(torch.equal(kept[name], after[name]) for name in after)
    again.model.offload.close(remove=True)


def transfers_of_two_steps(place, monkeypatch, mode):
    """How many there are, and the settings with which a further run makes the same ones."""
    with monkeypatch.context() as patch:
        engines = inject(patch, {})
        run = durable(place, **MODES[mode])
        budgets = {n: getattr(run.model.offload.config, n) for n in ("device_memory", "host_memory")}
        run.steps(2)
        run.model.offload.close(remove=True)
        counted = engines[0].counters()
    return counted["read_ops"] + counted["write_ops"], {**MODES[mode], **budgets}


@pytest.mark.parametrize("mode", slow_but(["emulated"], MODES))
def test_every_failing_transfer_leaves_the_last_committed_step(tmp_path, ideal, monkeypatch, mode):
    """For every n of a two-step run: the n-th transfer fails; the store opens and goes on with the right numbers."""
    losses, _ = ideal
    n_transfers, settings = transfers_of_two_steps(tmp_path / "count", monkeypatch, mode)
    assert n_transfers > 20
    every = max(1, n_transfers // 40)  # the slow campaign goes through all of them
    for nth in range(1 + sum(map(ord, mode)) % every, n_transfers + 1, every):
        fail_nth(tmp_path / f"n{nth}", monkeypatch, nth, settings, losses)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", MODES)
def test_every_single_failing_transfer_leaves_the_last_committed_step(tmp_path, ideal, monkeypatch, mode):
    losses, _ = ideal
    n_transfers, settings = transfers_of_two_steps(tmp_path / "count", monkeypatch, mode)
    for nth in range(1, n_transfers + 1):
        fail_nth(tmp_path / f"n{nth}", monkeypatch, nth, settings, losses)


def fail_nth(place, monkeypatch, nth, settings, losses):
    """Two steps with one failing transfer, and what a run after it finds."""
    got, run = [], None
    with monkeypatch.context() as patch:
        inject(patch, {"fail_nth": nth, "errno": errno.EIO})
        try:
            run = durable(place, **settings)
            for _ in range(2):
                got.append(run.step())
            run.close()
        except (OffloadError, OSError) as error:
            assert str(place) in str(error) or str(place) in str(error.__cause__), (
                f"transfer {nth}: {error!r}"
            )
            if run is not None:
                try:
                    run.close()
                except (OffloadError, OSError) as again:
                    assert str(again)
    assert got == losses[: len(got)], f"transfer {nth}: a wrong number, and nothing was said"
    after = durable(place, **settings)
    done = 0
    try:
        done = after.resume(place).step
    except CheckpointError as error:
        # Nothing had been committed: the failure came before the first record.
        assert "holds no checkpoint" in str(error) or "no step had been" in str(error), (
            f"transfer {nth}: {error}"
        )
    assert done >= len(got) - 1, f"transfer {nth}"
    assert after.steps(3 - done) == losses[done:3], f"transfer {nth}"
    after.model.offload.close(remove=True)


def test_a_disk_that_fills_in_the_middle_of_a_step_costs_that_step_only(tmp_path, ideal, monkeypatch):
    """The drive takes so many pages, as a file system that cannot reserve space does; then there is room again."""
    losses, path = ideal
    with monkeypatch.context() as patch:
        engines = inject(patch, {"quota_pages": 1 << 40})
        run = durable(tmp_path / "count")
        run.steps(1)
        after_one = engines[0].counters()["written_bytes"] // 4096
        run.model.offload.close(remove=True)
    with monkeypatch.context() as patch:
        inject(patch, {"quota_pages": after_one // 2 + 8})
        run = durable(tmp_path / "d")
        with pytest.raises((OffloadError, OSError), match="free space on this drive") as caught:
            run.steps(6)
        assert f"{tmp_path}/d" in str(caught.value)
        assert "bytes" in str(caught.value)
        done = len(run.losses)
        with pytest.raises((OffloadError, OSError)):
            run.close()
    after = durable(tmp_path / "d")
    try:
        resumed = after.resume(tmp_path / "d").step
    except CheckpointError:
        resumed = 0
    assert resumed >= done - 1
    assert after.steps(6 - resumed) == losses[resumed:]
    assert_same_state(after.save(tmp_path / "saved"), path)
    after.model.offload.close(remove=True)


def test_bytes_that_change_on_the_drive_are_noticed_before_they_are_used(tmp_path):
    run = durable(tmp_path / "d", verify_reads=True)
    run.steps(2)
    run.model.offload.flush()
    sides = run.model.offload.blocks[1].sides
    (path,) = (tmp_path / "d").glob("*.store")
    flip(path, sides.state_offsets[0][sides.current] + 100)
    with pytest.raises(OSError, match=r"checksum is wrong.*last committed step") as caught:
        run.steps(3)
    assert caught.value.errno == errno.EBADMSG
    with pytest.raises((OffloadError, OSError)):
        run.close()


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1e9}, {"device": "emulated"}])
def test_parameters_that_change_on_the_drive_are_noticed_before_they_are_computed_with(tmp_path, settings):
    """Nothing has been asked for: reads are verified by default."""
    run = durable(tmp_path / "d", layers=6, **settings)
    losses = run.steps(2)
    run.model.offload.flush()
    stored = next(b for b in run.model.offload.blocks if b.slot is None)
    sides = stored.sides
    assert sides.verifies
    (path,) = (tmp_path / "d").glob("*.store")
    flip(path, sides.param_offsets[sides.current] + 100)
    with pytest.raises((CorruptError, OSError), match=r"checksum.*last committed step") as caught:
        run.steps(1)
    assert str(path) in str(caught.value)
    assert len(run.losses) == len(losses)
    with pytest.raises((OffloadError, OSError)):
        run.close()


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_torn_record_falls_back_to_the_step_before_and_two_are_reported(tmp_path, ideal):
    losses, _ = ideal
    run = durable(tmp_path / "d")
    run.steps(4)
    slots = run.model.offload.commits._slots
    run.close()
    sequence = run.model.offload.commits.sequence
    (path,) = (tmp_path / "d").glob("*.store")
    flip(path, slots[sequence % 2] + 300)
    again = durable(tmp_path / "d")
    assert again.resume(tmp_path / "d").step == 3
    assert again.steps(2) == losses[3:5]
    again.model.offload.close(remove=True)


def test_a_store_without_a_whole_record_says_so(tmp_path):
    run = durable(tmp_path / "d")
    run.steps(3)
    slots = run.model.offload.commits._slots
    run.close()
    (path,) = (tmp_path / "d").glob("*.store")
    for slot in slots:
        flip(path, slot + 300)
    again = Run(storage=[str(tmp_path / "other")])
    with pytest.raises(CorruptError, match="neither of its two commit records is whole"):
        again.resume(tmp_path / "d")
    again.close()


HOLDS = """
import sys, time
from tests.fault.test_durable_steps import durable
run = durable(sys.argv[1])
run.steps(2)
print("running", flush=True)
time.sleep(60)
"""


def test_a_running_store_is_refused_and_a_dead_ones_is_taken_over(tmp_path, ideal):
    losses, _ = ideal
    child = start(HOLDS, tmp_path / "d")
    assert child.stdout.readline() == "running\n", end(child)
    run = durable(tmp_path / "d")
    with pytest.raises(CheckpointError, match="a living process is using this store"):
        run.resume(tmp_path / "d")
    child.kill()
    end(child)
    assert run.resume(tmp_path / "d").step >= 1
    assert run.steps(2) == losses[run.optimizer.steps_made - 2 :][:2]
    assert len(list((tmp_path / "d").glob("*.store"))) == 1
    run.model.offload.close(remove=True)


def test_a_commit_that_fails_stops_training_and_keeps_the_step_before(tmp_path, ideal, monkeypatch):
    losses, _ = ideal
    run = durable(tmp_path / "d")
    run.steps(3)
    run.model.offload.commits.wait()

    def broken(self):
        raise OSError(errno.EIO, f"fdatasync of {tmp_path}")

    with monkeypatch.context() as patch:
        patch.setattr(StepCommits, "_sync", broken)
        with pytest.raises(StoreError, match=r"could not be committed.*the step before it is intact"):
            run.steps(2)
        with pytest.raises((OffloadError, OSError)):
            run.close()
    again = durable(tmp_path / "d")
    done = again.resume(tmp_path / "d").step
    assert done in (2, 3)
    assert again.steps(2) == losses[done : done + 2]
    again.model.offload.close(remove=True)


def test_no_storage_and_no_streaming_are_refused(tmp_path):
    for settings in ({}, {"storage": [str(tmp_path)], "step_aside": "always"}):
        with pytest.raises(ConfigError, match="durability='step' keeps every step on storage"):
            Run(durability="step", device_memory=1, **settings)


def test_durability_none_refuses_to_save_and_checkpoint_writes_nothing_more(tmp_path):
    run = Run(storage=[str(tmp_path / "d")], durability="none")
    run.steps(2)
    with pytest.raises(ConfigError, match="durability='none' keeps nothing"):
        run.save(tmp_path / "saved")
    run.model.offload.flush()
    counted = run.model.offload.counters()
    run.close()
    other = Run(storage=[str(tmp_path / "d")])
    other.steps(2)
    other.model.offload.flush()
    assert other.model.offload.counters() == counted
    assert other.model.offload.commits is None
    other.close()


def test_state_that_is_too_large_for_a_record_says_how_large(tmp_path):
    run = durable(tmp_path / "d")

    class Hoard:
        def state_dict(self):
            return {"everything": torch.zeros(1 << 20)}

        def load_state_dict(self, state):
            raise AssertionError

    run.model.offload.track(hoard=Hoard())
    with pytest.raises(StoreError, match=r"takes \d+ bytes, \d+ are kept for it"):
        run.steps(2)
    with pytest.raises((UsageError, StoreError)):
        run.close()


def test_storage_is_what_the_documents_say(tmp_path):
    """All state twice, and two records; nothing beside."""
    run = durable(tmp_path / "d")
    layouts = [b.layout for b in [run.model.offload.root, *run.model.offload.blocks]]
    once = sum(x.slot_nbytes + x.state_nbytes for x in layouts)
    (path,) = (tmp_path / "d").glob("*.store")
    records = 2 * run.model.offload.commits._slot_nbytes
    slack = 4096 * 8 * (len(layouts) + 1) + (1 << 20) + 4096
    assert 2 * once + records <= os.path.getsize(path) <= 2 * once + records + slack
    run.model.offload.close(remove=True)


def test_engines_that_sync_say_what_fails(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4096))
    engine = Engine([str(tmp_path / "file")])
    engine.sync()
    engine.close()
    with pytest.raises(OSError, match="closed"):
        engine.sync()
    assert storage.Engine is Engine

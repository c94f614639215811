"""A killed run's store goes on itself where the new run's would be the same; otherwise it is copied."""

from __future__ import annotations

import os

import pytest

import offload
from offload.errors import CheckpointError, CorruptError
from tests.child import end, start
from tests.fault.test_checkpoint import assert_same_state
from tests.fault.test_durable_steps import MODES, durable, flip, poison
from tests.fault.trajectory import Run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]


def files_in(place):
    return {path.name: path.stat().st_ino for path in place.iterdir()}


@pytest.mark.parametrize(
    "mode", [m if m == "backward" else pytest.param(m, marks=pytest.mark.slow) for m in MODES]
)
def test_the_same_files_go_on_and_resuming_writes_nothing(tmp_path, mode):
    still = durable(tmp_path / "still", **MODES[mode])
    losses = still.steps(6)
    expected = still.save(tmp_path / "expected")
    still.model.offload.close(remove=True)
    first = durable(tmp_path / "d", **MODES[mode])
    first.steps(3)
    first.close()
    kept = files_in(tmp_path / "d")
    second = durable(tmp_path / "d", **MODES[mode])
    before = second.model.offload.counters()["written_bytes"]
    assert second.resume(tmp_path / "d").step == 3
    assert second.model.offload.counters()["written_bytes"] == before
    assert files_in(tmp_path / "d") == kept
    poison(second)  # a step that is discarded at once leaves what was resumed
    second.step()
    assert second.model.offload.last_step["discarded"]
    second.close()
    third = durable(tmp_path / "d", **MODES[mode])
    third.resume(tmp_path / "d")
    third.close()
    assert files_in(tmp_path / "d") == kept
    undisturbed = durable(tmp_path / "e", **MODES[mode])
    undisturbed.steps(3)
    undisturbed.close()
    again = durable(tmp_path / "e", **MODES[mode])
    again.resume(tmp_path / "e")
    assert again.steps(3) == losses[3:]
    assert_same_state(again.save(tmp_path / "saved"), expected)
    again.model.offload.close(remove=True)
    assert os.listdir(tmp_path / "e") == []


@pytest.mark.parametrize(
    "changes",
    [{"chunk_elements": 4096}, {"stripe_nbytes": 8192}, {"head_width": 1, "durability": "checkpoint"}],
)
def test_a_store_that_would_be_another_is_copied(tmp_path, changes):
    first = durable(tmp_path / "d")
    losses = first.steps(3)
    first.close()
    kept = files_in(tmp_path / "d")
    settings = {"storage": [str(tmp_path / "d")], "durability": "step", **changes}
    if "stripe_nbytes" in changes:
        settings["storage"].append(str(tmp_path / "d-two"))
    second = Run(**settings)
    assert second.resume(tmp_path / "d").step == 3
    assert (kept.items() <= files_in(tmp_path / "d").items()) is (settings["durability"] == "checkpoint")
    still = Run(storage=[str(tmp_path / "still")])
    assert still.steps(3) == losses
    assert_same_state(second.save(tmp_path / "one"), second.save(tmp_path / "two"))
    second.model.offload.close(remove=True)
    still.close()


def test_a_corrupt_chunk_is_noticed_before_the_store_goes_on(tmp_path):
    first = durable(tmp_path / "d")
    first.steps(3)
    sides = first.model.offload.blocks[1].sides
    first.close()
    (path,) = (tmp_path / "d").glob("*.store")
    flip(path, sides.state_offsets[0][sides.committed] + 100)
    kept = files_in(tmp_path / "d")
    second = durable(tmp_path / "d")
    with pytest.raises(CorruptError, match="CRC32C"):
        second.resume(tmp_path / "d")
    assert kept.items() <= files_in(tmp_path / "d").items()
    second.model.offload.close(remove=True)
    assert files_in(tmp_path / "d") == kept


@pytest.mark.parametrize("mode", ["backward", "two drives"])
def test_a_kept_store_is_inspected_and_every_byte_of_its_committed_step_verified(tmp_path, mode):
    first = durable(tmp_path / "d", **MODES[mode])
    first.steps(3)
    sides = first.model.offload.blocks[1].sides
    drives = [f"{tmp_path}/d-two"] if mode == "two drives" else []
    with pytest.raises(CheckpointError, match="a living process"):
        offload.inspect(str(tmp_path / "d"), drives=drives)
    first.close()
    found = offload.inspect(str(tmp_path / "d"), verify=True, drives=drives)
    assert (found.step, found.damage, sorted(found.tracked)) == (3, [], ["data", "scheduler"])
    n_elements = sum(b.n_elements for x in first.model.offload.blocks for b in x.layout.buffers)
    assert found.verified_chunks > n_elements // 2048
    if drives:
        with pytest.raises(CheckpointError, match="name every drive that the run had"):
            offload.inspect(str(tmp_path / "d"))
        return
    (path,) = (tmp_path / "d").glob("*.store")
    flip(path, sides.state_offsets[0][1 - sides.committed] + 100)  # not of the committed step
    assert offload.inspect(str(tmp_path / "d"), verify=True).damage == []
    flip(path, sides.state_offsets[0][sides.committed] + 100)
    (said,) = offload.inspect(str(tmp_path / "d"), verify=True).damage
    assert str(path) in said


DIES = """
import os, sys
from offload.runtime.commits import StepCommits
from tests.fault.test_durable_steps import durable
run = durable(sys.argv[1])
real = StepCommits.go_on_from
def dies(self, *arguments):
    real(self, *arguments)
    os._exit(9)
StepCommits.go_on_from = dies
run.resume(sys.argv[1])
"""


@pytest.mark.slow
def test_a_death_right_after_taking_over_costs_nothing(tmp_path):
    first = durable(tmp_path / "d")
    losses = first.steps(2)
    first.close()
    status, _, err = end(start(DIES, tmp_path / "d"))
    assert status == 9, err
    last = durable(tmp_path / "d")
    assert last.resume(tmp_path / "d").step == 2
    assert len(list((tmp_path / "d").glob("*.store"))) == 1
    later = last.steps(2)
    last.model.offload.close(remove=True)
    still = durable(tmp_path / "still")
    assert still.steps(4) == losses + later
    still.model.offload.close(remove=True)


DIES_WHILE_RESUMING = """
import os, sys
from offload.checkpoint import kept_store
from tests.fault.test_durable_steps import durable
run = durable(sys.argv[1])
kept_store.unframe = lambda *_: os._exit(9)
run.resume(sys.argv[1])
"""


@pytest.mark.slow
def test_what_a_run_leaves_that_is_killed_while_it_resumes_goes_with_the_next(tmp_path):
    """Its own store had no step yet, and nothing describes it; a living run's store of the same kind stays."""
    still = durable(tmp_path / "still")
    losses = still.steps(4)
    still.model.offload.close(remove=True)
    first = durable(tmp_path / "d")
    first.steps(2)
    first.close()
    for _ in range(2):
        status, _, err = end(start(DIES_WHILE_RESUMING, tmp_path / "d"))
        assert status == 9, err
    assert len(list((tmp_path / "d").glob("*.store"))) == 3
    living = durable(tmp_path / "d")
    last = durable(tmp_path / "d")
    assert last.resume(tmp_path / "d").step == 2
    paths = [run.model.offload.parts.resources.store.paths[0] for run in (living, last)]
    assert sorted(map(str, (tmp_path / "d").glob("*.store"))) == sorted(paths)
    assert last.steps(2) == losses[2:]
    last.model.offload.close(remove=True)
    living.steps(1)
    living.model.offload.close(remove=True)
    assert os.listdir(tmp_path / "d") == []

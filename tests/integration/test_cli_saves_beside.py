"""`offload finetune --save-every`: periodic checkpoints go on beside the steps and are of their step boundary still."""

from __future__ import annotations

import json
import os
import signal
import threading
import types

import pytest
import torch

import offload
from offload.checkpoint import directory
from offload.checkpoint.copying import StreamingCopy
from offload.cli.checkpoints import Checkpoints, WriteBudget
from offload.cli.output import JsonOutput
from tests.child import end
from tests.fault.test_checkpoint import assert_same_state
from tests.integration.command_line import finetune, make_workplace, start_finetune
from tests.integration.test_cli_checkpoints import lines_of

transformers = pytest.importorskip("transformers")

IN_HOST = ["--host-memory", "200MB"]


def saved_paths(said):
    return [line.split()[1] for line in said.splitlines() if line.startswith("saved ")]


def is_saving():
    """Whether this is the thread in which a checkpoint is copied beside training."""
    return threading.current_thread().name == "offload-save"


@pytest.fixture
def told(monkeypatch):
    """What the run says and the steps it reports, in order; `after_report(step)` is called after each report."""
    events, hooks = [], []
    note, report = JsonOutput.note, JsonOutput.step

    def noted(self, text):
        events.append(text)
        note(self, text)

    def reported(self, step):
        events.append(step.step)
        report(self, step)
        for hook in hooks:
            hook(step.step)

    monkeypatch.setattr(JsonOutput, "note", noted)
    monkeypatch.setattr(JsonOutput, "step", reported)
    events_and_hooks = type("Told", (), {"events": events, "after_report": hooks.append})
    return events_and_hooks


@pytest.fixture
def held(monkeypatch):
    """The write of a checkpoint ends only when this is set: everything of it has been copied, nothing has a name."""
    go_on, commit = threading.Event(), directory.NewCheckpoint.commit

    def commits(self):
        if is_saving():
            assert go_on.wait(60)
        return commit(self)

    monkeypatch.setattr(directory.NewCheckpoint, "commit", commits)
    yield go_on
    go_on.set()


@pytest.mark.parametrize("level", ["checkpoint", "step"])
def test_steps_go_on_while_a_checkpoint_is_being_written_and_it_is_of_its_boundary(
    workplace, capsys, told, held, level
):
    """The checkpoint of step 2 cannot end before step 4 has been reported; then it is, bit for bit, that of step 2."""
    more = ["--json", "--durability", level]
    assert finetune(workplace, *more, "--steps", "2", "--checkpoints", f"{workplace}/expected") == 0
    capsys.readouterr()
    more += ["--steps", "5"]
    told.events.clear()
    told.after_report(lambda step: held.set() if step == 4 else None)
    assert finetune(workplace, *more, "--checkpoints", f"{workplace}/saved", "--save-every", "2") == 0
    losses, summary, said = lines_of(capsys)
    assert list(losses) == [1, 2, 3, 4, 5]
    first, second, last = saved_paths(said)
    assert [os.path.basename(p) for p in (first, second, last)] == [f"step-{step:09d}" for step in (2, 4, 5)]
    at = told.events.index(f"saved {first}")
    assert max(told.events.index(3), told.events.index(4)) < at, "steps have waited for the checkpoint"
    assert_same_state(first, f"{workplace}/expected/step-000000002")
    assert summary["saved_step"] == 5
    nbytes = sum(entry.stat().st_size for path in (first, second, last) for entry in os.scandir(path))
    assert summary["checkpoints_gb"] * 1e9 == pytest.approx(nbytes, abs=1)
    assert finetune(workplace, *more, "--resume", first) == 0
    assert lines_of(capsys)[0] == {step: losses[step] for step in (3, 4, 5)}


@pytest.mark.parametrize("every", ["1", "2"])
def test_saving_beside_the_steps_changes_no_loss_and_no_count_of_what_steps_move(
    workplace, capsys, monkeypatch, every
):
    more = ["--json", "--steps", "5"]
    assert finetune(workplace, *more) == 0
    plain, moved = steps_of(capsys)
    copied = StreamingCopy.add

    def slow(self, item):
        if is_saving():
            threading.Event().wait(0.002)
        copied(self, item)

    monkeypatch.setattr(StreamingCopy, "add", slow)
    assert finetune(workplace, *more, "--checkpoints", f"{workplace}/saved", "--save-every", every) == 0
    saving, moved_saving = steps_of(capsys)
    assert [line["loss"] for line in saving] == [line["loss"] for line in plain]
    path = f"{workplace}/saved/step-000000004"
    one_nbytes = sum(entry.stat().st_size for entry in os.scandir(path))
    assert moved_saving["written_gb"] == moved["written_gb"]
    assert abs(moved_saving["read_gb"] - moved["read_gb"]) * 1e9 < one_nbytes / 2  # some is read ahead


def steps_of(capsys):
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return lines[:-1], lines[-1]["summary"]


def failing_save(monkeypatch, nth=1):
    """Let the n-th save beside training fail once all is copied."""
    finish, count = StreamingCopy.finish, []

    def fails(self):
        finish(self)
        if is_saving():
            count.append(self)
            if len(count) == nth:
                raise OSError(5, "Input/output error: the drive of the checkpoints")

    monkeypatch.setattr(StreamingCopy, "finish", fails)


def test_a_save_beside_the_steps_that_fails_ends_the_run_with_its_error(workplace, capsys, monkeypatch):
    """Found at the next step at which it has ended; the checkpoint before stays, and the store goes."""
    failing_save(monkeypatch, nth=2)
    saved = f"{workplace}/saved"
    assert finetune(workplace, "--json", "--steps", "1000", "--checkpoints", saved, "--save-every", "2") == 1
    printed = capsys.readouterr()
    assert "a checkpoint could not be written" in printed.err
    assert "the drive of the checkpoints" in printed.err
    assert "those before it are intact" in printed.err
    assert [os.path.basename(path) for path in saved_paths(printed.err)] == ["step-000000002"]
    assert sorted(os.listdir(saved)) == [".lock", "step-000000002"]
    assert len(printed.out.splitlines()) <= 6, "the run has gone on long after the failure"
    assert os.listdir(workplace / "store") == []


def test_a_save_that_fails_where_a_later_one_takes_its_place_costs_nothing(workplace, capsys, monkeypatch):
    """The last step's checkpoint is waited for anyway: nothing is lost, the run ends well, and the failure is said."""
    failing_save(monkeypatch)
    saved = f"{workplace}/saved"
    assert finetune(workplace, "--json", "--steps", "3", "--checkpoints", saved, "--save-every", "2") == 0
    _, summary, said = lines_of(capsys)
    assert "could not be written" in said
    assert "after step 3 is saved instead" in said
    assert summary["saved_step"] == 3
    assert sorted(os.listdir(saved)) == [".lock", "step-000000003"]


def test_a_run_that_fails_completes_the_checkpoint_that_is_being_written(workplace, capsys, told, held):
    """A loss that is not finite, while that of the step before is on its way."""
    told.after_report(lambda step: threading.Timer(0.3, held.set).start() if step == 2 else None)
    saved = f"{workplace}/saved"
    arguments = ["--json", "--steps", "20", "--lr", "1e30", "--checkpoints", saved, "--save-every", "1"]
    assert finetune(workplace, *arguments) == 1
    printed = capsys.readouterr()
    assert "lower --lr" in printed.err
    complete = [os.path.basename(path) for path in saved_paths(printed.err)]
    assert complete
    assert sorted(os.listdir(saved)) == [".lock", *complete]


def test_stopping_waits_for_what_is_being_written_and_saves_the_step(workplace, capsys, told, held):
    """SIGTERM comes while the checkpoint of step 2 is being written: it and the one of the last step are complete."""

    def stop(step):
        if step == 3:
            threading.Timer(0.3, held.set).start()
            signal.raise_signal(signal.SIGTERM)

    told.after_report(stop)
    saved = f"{workplace}/saved"
    assert finetune(workplace, "--json", "--steps", "100", "--checkpoints", saved, "--save-every", "2") == 130
    said = capsys.readouterr().err
    assert "stopping: this step ends and is saved" in said
    assert [os.path.basename(path) for path in saved_paths(said)] == ["step-000000002", "step-000000003"]
    assert f"step 3 is saved in {saved}" in said
    assert sorted(os.listdir(saved)) == [".lock", "step-000000002", "step-000000003"]
    assert os.listdir(workplace / "store") == []


@pytest.mark.parametrize("where", [[], IN_HOST], ids=["storage", "host"])
def test_a_second_signal_ends_the_run_at_once_and_leaves_no_half_of_a_checkpoint(
    workplace, capsys, told, monkeypatch, where
):
    """The checkpoint of step 2 would take minutes: it is given up, and what is said of it is true."""
    copied, slow = StreamingCopy.add, threading.Event()

    def add(self, item):
        if is_saving():
            slow.wait(0.5)
        copied(self, item)

    monkeypatch.setattr(StreamingCopy, "add", add)

    def stop(step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    told.after_report(stop)
    saved = f"{workplace}/saved"
    arguments = [
        "--json",
        "--steps",
        "100",
        "--checkpoints",
        saved,
        "--save-every",
        "2",
        "--durability",
        "step",
    ]
    assert finetune(workplace, *arguments, *where) == 130
    said = capsys.readouterr().err
    assert "is saved in" not in said
    assert saved_paths(said) == []
    assert os.listdir(saved) == [".lock"]


@pytest.mark.slow
@pytest.mark.parametrize(("every", "rule"), [("1", "adamw"), ("3", "adamw"), ("1", "adafactor")])
def test_with_saves_beside_the_steps_no_write_budget_is_exceeded(workplace, capsys, every, rule):
    """Whatever the budget, the run stops at a checkpoint within it, and goes on from there with the right losses."""
    more = ["--json", "--steps", "6", "--optimizer", rule]
    saving = ["--save-every", every, "--checkpoints"]
    assert finetune(workplace, *more, *saving, f"{workplace}/first") == 0
    expected, whole, _ = lines_of(capsys)
    written = sum(whole["written_gb_by_drive"].values()) + whole["checkpoints_gb"]
    for share in (0.5, 0.65, 0.8, 0.95):
        saved = f"{workplace}/saved-{share}"
        budget = int(share * written * 1e9)
        assert finetune(workplace, *more, *saving, saved, "--write-budget", str(budget)) == 0
        losses, summary, _ = lines_of(capsys)
        spent = sum(summary["written_gb_by_drive"].values()) + summary["checkpoints_gb"]
        assert round(spent * 1e9) <= budget, share
        assert summary["status"] == "write budget used"
        assert summary["saved_step"] == max(losses) < 6
        assert finetune(workplace, *more, "--resume", saved) == 0
        assert losses | lines_of(capsys)[0] == expected


@pytest.mark.parametrize("rule", [torch.optim.AdamW, torch.optim.Adafactor])
def test_a_checkpoint_is_not_larger_than_was_counted_for_it_beforehand(tmp_path, rule):
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(4)))
    model, optimizer = offload.wrap(
        model,
        rule(model.parameters(), lr=1e-3),
        device_memory="64MB",
        host_memory="128MB",
        step_aside="never",
    )
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(model, {}, types.SimpleNamespace(checkpoints=str(tmp_path)), None)
    counted_nbytes = checkpoints.next_nbytes
    path = offload.save(model, str(tmp_path))
    written_nbytes = sum(entry.stat().st_size for entry in os.scandir(path))
    assert 0.97 * counted_nbytes < written_nbytes <= counted_nbytes
    model.offload.close()


@pytest.mark.parametrize(("budget", "last"), [(100, 1), (250, 2), (399, 3), (400, 4)])
def test_bytes_of_updates_that_still_go_on_count_for_the_write_budget(budget, last):
    """A step writes 100 bytes, the last of them its record; none is counted before the next step unless waited for."""
    written = {"landed": 0, "submitted": 0}
    engine = types.SimpleNamespace(
        written_by_drive=lambda: {"drive": written["landed"]},
        flush=lambda: written.update(landed=written["submitted"] - 1),
        wait_committed=lambda: written.update(landed=written["submitted"]),
    )
    checkpoints = types.SimpleNamespace(
        state_nbytes=100, next_nbytes=0, written_nbytes=0, is_due=lambda step: False
    )
    used_up = WriteBudget(str(budget), checkpoints, engine)
    for step in range(1, 9):
        written.update(landed=written["submitted"], submitted=written["submitted"] + 100)
        if used_up.is_used_up(step):
            break
    assert step == last
    assert written["landed"] == written["submitted"]


SLOW_FOURTH_SAVE = """
import sys, threading, time, torch
torch.set_num_threads(1)
from offload.checkpoint import directory
from offload.cli import main
commit = directory.NewCheckpoint.commit
def commits(self):
    if threading.current_thread().name == "offload-save" and self.final.endswith("4"):
        print("step 4 is being saved", flush=True)
        time.sleep(60)
    return commit(self)
directory.NewCheckpoint.commit = commits
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(200)
def test_a_kill_while_a_periodic_checkpoint_is_written_leaves_those_before(tmp_path):
    make_workplace(tmp_path, layers=2)
    arguments = ["--storage", tmp_path / "store", "--checkpoints", tmp_path / "saved", "--save-every", 2]
    child = start_finetune(tmp_path, *arguments, "--steps", 100_000, script=SLOW_FOURTH_SAVE)
    losses = {}
    for line in child.stdout:
        if line == "step 4 is being saved\n":
            break
        losses |= {json.loads(line)["step"]: json.loads(line)["loss"]}
    child.kill()
    end(child)
    assert [name for name in sorted(os.listdir(tmp_path / "saved")) if name.startswith("step-")] == [
        "step-000000002"
    ]
    child = start_finetune(tmp_path, *arguments, "--steps", 3, "--resume", tmp_path / "saved")
    status, out, err = end(child, 60)
    assert status == 0, err
    resumed = {line["step"]: line["loss"] for line in map(json.loads, out.splitlines()) if "step" in line}
    assert list(resumed) == [3]
    assert all(resumed[step] == losses[step] for step in resumed.keys() & losses.keys())

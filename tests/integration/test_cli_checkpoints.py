"""`finetune` saves, stops at a signal with a checkpoint, and goes on from it with the numbers it would have had."""

from __future__ import annotations

import json
import os
import pathlib
import signal

import pytest

from offload.cli import main
from tests.child import end
from tests.fault import disks
from tests.integration.command_line import finetune, make_workplace, start_finetune

transformers = pytest.importorskip("transformers")


def lines_of(capsys):
    """The JSON lines of a run: losses by step, the summary, and what was said beside."""
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    steps = {line["step"]: line["loss"] for line in lines if "step" in line}
    return steps, lines[-1].get("summary"), printed.err


def test_a_resumed_run_repeats_the_uninterrupted_ones_losses(workplace, capsys):
    more = ["--json", "--schedule", "cosine", "--warmup-steps", "1", "--steps", "5"]
    saved = f"{workplace}/saved"
    assert finetune(workplace, *more, "--checkpoints", saved, "--save-every", "2") == 0
    expected, summary, said = lines_of(capsys)
    assert [os.path.basename(line.split()[1]) for line in said.splitlines() if line.startswith("saved ")] == [
        "step-000000002", "step-000000004", "step-000000005",
    ]  # fmt: skip
    assert summary["saved_step"] == 5
    arguments = ["--checkpoints", saved, "--keep-last", "1", "--host-memory", "200MB"]
    assert finetune(workplace, *more, *arguments, "--resume", f"{saved}/step-000000002") == 0
    resumed, _, said = lines_of(capsys)
    assert "after step 2" in said
    assert resumed == {step: expected[step] for step in (3, 4, 5)}
    assert sorted(os.listdir(saved)) == [".lock", "step-000000005-1"]


def test_a_fresh_run_refuses_a_directory_with_the_checkpoints_of_an_earlier_one(workplace, capsys):
    saved = f"{workplace}/saved"
    assert finetune(workplace, "--checkpoints", saved, "--steps", "2") == 0
    assert finetune(workplace, "--checkpoints", saved, "--steps", "1", "--keep-last", "1") == 2
    assert f"step-000000002 among them: go on from it with --resume {saved}" in capsys.readouterr().err
    assert sorted(os.listdir(saved)) == [".lock", "step-000000002"]
    assert finetune(workplace, "--checkpoints", saved, "--steps", "3", "--resume", saved) == 0


def test_resuming_with_other_data_is_refused(workplace, capsys):
    saved = f"{workplace}/saved"
    assert finetune(workplace, "--checkpoints", saved, "--steps", "1") == 0
    assert finetune(workplace, "--resume", saved, "--batch-size", "3") == 2
    assert "had batch size 2, this one has 3" in capsys.readouterr().err
    assert finetune(workplace, "--resume", f"{workplace}/nowhere") == 2
    assert finetune(workplace, "--save-every", "2") == 2
    assert "--save-every needs --checkpoints" in capsys.readouterr().err


def test_inspect_describes_and_verifies(workplace, capsys):
    saved = f"{workplace}/saved"
    assert finetune(workplace, "--checkpoints", saved, "--steps", "1") == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", saved, "--verify", "--json"])
    assert not stopped.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 1
    assert found["tracked"] == ["scheduler", "data"]
    assert found["damage"] == []
    assert found["verified_chunks"] >= 3
    extents = pathlib.Path(saved, "step-000000001", "extents.bin")
    held = bytearray(extents.read_bytes())
    held[5] ^= 1
    extents.write_bytes(held)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", saved, "--verify"])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "1 damaged" in printed.out
    assert "CRC32C" in printed.err


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(200)
def test_sigterm_finishes_the_step_saves_it_and_the_next_run_goes_on(tmp_path):
    make_workplace(tmp_path, layers=2)
    arguments = ["--storage", tmp_path / "store", "--checkpoints", tmp_path / "saved"]
    child = start_finetune(tmp_path, *arguments, "--steps", 100_000)
    seen = [json.loads(child.stdout.readline()) for _ in range(3)]
    child.send_signal(signal.SIGTERM)
    status, out, err = end(child, 60)
    assert status == 130, err
    assert "stopping: this step ends and is saved" in err
    losses = {line["step"]: line["loss"] for line in seen}
    losses |= {line["step"]: line["loss"] for line in map(json.loads, out.splitlines()) if "step" in line}
    last = max(losses)
    assert f"step {last} is saved in {tmp_path}/saved" in err
    assert os.listdir(tmp_path / "store") == []
    child = start_finetune(tmp_path, *arguments, "--steps", last + 1, "--resume", tmp_path / "saved")
    status, out, err = end(child, 60)
    assert status == 0, err
    assert [json.loads(line).get("step") for line in out.splitlines()] == [last + 1, None]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(200)
def test_a_killed_run_with_durable_steps_goes_on_from_its_store(tmp_path):
    """SIGKILL, then SIGTERM, then to the end: the losses are those of a run that was left alone."""
    make_workplace(tmp_path, layers=2)
    durable = ["--storage", tmp_path / "store", "--durability", "step"]
    losses = {}
    for number, resumed in ((signal.SIGKILL, []), (signal.SIGTERM, ["--resume", tmp_path / "store"])):
        child = start_finetune(tmp_path, "--steps", 400, *durable, *resumed)
        seen = [child.stdout.readline() for _ in range(4)]
        assert all(seen), end(child)
        child.send_signal(number)
        status, out, err = end(child, 60)
        assert status in (-signal.SIGKILL, 130), err
        for line in [*map(json.loads, seen), *map(json.loads, filter(whole_line, out.splitlines()))]:
            if "step" in line:
                assert losses.setdefault(line["step"], line["loss"]) == line["loss"]
    assert f"--resume {tmp_path}/store" in err
    last = str(max(losses) + 2)
    child = start_finetune(tmp_path, *durable, "--resume", tmp_path / "store", "--steps", last)
    status, out, err = end(child, 60)
    assert status == 0, err
    for line in map(json.loads, out.splitlines()):
        if "step" in line:
            assert losses.setdefault(line["step"], line["loss"]) == line["loss"]
    assert os.listdir(tmp_path / "store") == []
    child = start_finetune(tmp_path, "--storage", tmp_path / "other", "--steps", last)
    status, out, err = end(child, 60)
    assert status == 0, err
    expected = {line["step"]: line["loss"] for line in map(json.loads, out.splitlines()) if "step" in line}
    assert losses == expected


def whole_line(text):
    """A line that the kill has not cut."""
    return text.startswith("{") and text.endswith("}")


def test_a_loss_that_is_not_finite_ends_the_run_with_what_to_do(workplace, capsys):
    assert finetune(workplace, "--lr", "1e30", "--steps", "20") == 1
    assert "lower --lr" in capsys.readouterr().err
    assert os.listdir(workplace / "store") == []


@pytest.mark.parametrize("level", ["checkpoint", "step"])
def test_a_write_budget_stops_the_run_before_it_is_exceeded_where_it_can_go_on(workplace, capsys, level):
    more = ["--json", "--steps", "6", "--durability", level]
    kept = f"{workplace}/saved" if level == "checkpoint" else f"{workplace}/store"
    first = ["--checkpoints", f"{workplace}/first"] if level == "checkpoint" else []
    assert finetune(workplace, *more, *first) == 0
    expected, whole, _ = lines_of(capsys)
    more += ["--checkpoints", kept] if level == "checkpoint" else []
    written = sum(whole["written_gb_by_drive"].values()) + whole["checkpoints_gb"]
    assert finetune(workplace, *more, "--write-budget", f"{int(0.8 * written * 1e9)}") == 0
    losses, summary, said = lines_of(capsys)
    assert summary["status"] == "write budget used"
    assert set(summary["drive_wear"]) == set(summary["written_gb_by_drive"]) == {f"{workplace}/store"}
    assert 1 <= max(losses) < 6
    assert "the next would exceed --write-budget" in said
    spent = sum(summary["written_gb_by_drive"].values()) + summary["checkpoints_gb"]
    assert spent <= 0.8 * written
    assert finetune(workplace, *more, "--resume", kept) == 0
    rest, _, _ = lines_of(capsys)
    assert losses | rest == expected
    assert finetune(workplace, "--write-budget", "1GB") == 2
    assert "--checkpoints DIR or --durability step" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--checkpoints"])
def test_what_will_not_fit_after_training_is_refused_before_the_first_step(workplace, option, capsys):
    with disks.in_memory(workplace / "disk", 64 << 10) as disk:
        assert finetune(workplace, "--json", option, f"{disk}/out") == 1
        printed = capsys.readouterr()
        assert f"{option} {disk}/out" in printed.err
        assert "nothing has been trained yet" in printed.err
        assert printed.out == ""
        assert os.listdir(disk) == os.listdir(workplace / "store") == []

"""`offload finetune` plans where a profile of the machine is known, says what it expects, and draws a step."""

import json
import os

import pytest

import offload
from offload.cli import planned
from offload.cli.plan import load_plan
from offload.cli.planned import endurance_lines
from offload.planner.hardware import load_hardware, save_hardware
from offload.planner.plan import INPUT, Plan
from offload.runtime import late_plan
from offload.schedule.run import endurance_steps
from tests.integration.command_line import finetune

pytestmark = pytest.mark.usefixtures("traced_once")

EMULATED = [
    "--hardware",
    "laptop-8gb",
    "--device",
    "emulated",
    "--host-memory",
    "40MB",
    "--device-memory",
    "2MB",
]


def run(place, capsys, *more):
    """(step lines, summary, notes) of a run that ends well."""
    assert finetune(place, "--json", *more) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    return lines[:-1], lines[-1]["summary"], printed.err


def test_the_plan_is_printed_first_and_its_seconds_stand_beside_the_measured(workplace, capsys):
    saved = workplace / "plan.json"
    steps, summary, notes = run(
        workplace, capsys, *EMULATED, "--micro-batches", "1", "--save-plan", str(saved)
    )
    plan = Plan.from_json(saved.read_text())
    assert (plan.batch_samples, plan.tokens_per_sample, plan.micro_batches) == (2, 16, 1)
    assert summary["predicted_step_s"] == plan.predicted.step_s
    assert summary["median_step_s"] > 0
    for word in ("window", "activations", "throughput"):
        assert f"\n{word} " in notes
    unplanned, _, _ = run(workplace, capsys)
    assert [s["loss"] for s in steps] == [s["loss"] for s in unplanned]
    again, summary, _ = run(workplace, capsys, *EMULATED[2:], "--plan", str(saved))
    assert [s["loss"] for s in again] == [s["loss"] for s in steps]
    assert summary["predicted_step_s"] == plan.predicted.step_s


def test_a_plan_is_read_once(workplace, capsys, monkeypatch):
    """What is checked is what is run: a file that changes meanwhile changes nothing."""
    saved = workplace / "plan.json"
    run(workplace, capsys, *EMULATED, "--save-plan", str(saved))
    text = saved.read_text()

    def load_and_lose(path):
        plan = load_plan(path)
        saved.unlink()
        return plan

    monkeypatch.setattr(planned, "load_plan", load_and_lose)
    again = workplace / "again.json"
    run(workplace, capsys, *EMULATED[2:], "--plan", str(saved), "--save-plan", str(again))
    assert again.read_text() == text


def test_a_plan_for_another_batch_runs_without_its_seconds(workplace, capsys):
    saved = workplace / "plan.json"
    run(workplace, capsys, *EMULATED, "--save-plan", str(saved))
    _, summary, notes = run(workplace, capsys, *EMULATED[2:], "--plan", str(saved), "--batch-size", "4")
    assert "its seconds are not this run's" in notes
    assert summary["predicted_step_s"] is None


def test_without_a_profile_one_line_names_the_way_to_one_and_the_run_goes_on(workplace, capsys):
    _, summary, notes = run(workplace, capsys)
    assert len([line for line in notes.splitlines() if "offload probe" in line]) == 1
    assert summary["predicted_step_s"] is None
    assert summary["endurance_steps"] is None


def test_a_plan_that_is_made_after_the_first_step_is_printed_then(workplace, capsys, monkeypatch):
    monkeypatch.setattr(late_plan, "STEP_FLOPS_MIN", 0.0)
    monkeypatch.setattr(late_plan, "_PROBE_S", 0.001)
    memory = ("--host-memory", "100MB", "--device", "cpu", "--device-memory", "50MB")
    assert finetune(workplace, *memory) == 0
    lines = capsys.readouterr().err.splitlines()
    [said] = [number for number, line in enumerate(lines) if "now that a step has shown its batch" in line]
    assert [number > said for number, line in enumerate(lines) if "block slots" in line] == [True]
    assert finetune(workplace, *memory, "--plan", "none") == 0
    assert "now that a step" not in capsys.readouterr().err


def test_a_stored_profile_is_planned_with_unless_told_otherwise(workplace, capsys, tmp_path):
    save_hardware(load_hardware("laptop-8gb", ["shares_host=true"]), str(tmp_path / "profile.json"))
    memory = ("--host-memory", "40MB", "--device", "cpu", "--device-memory", "12MB")
    _, summary, _ = run(workplace, capsys, *memory)
    assert summary["predicted_step_s"] > 0
    for more, why in (
        (("--plan", "none"), "--plan none"),
        (("--device", "emulated"), "computes in host memory, unlike --device emulated"),
    ):
        _, summary, notes = run(workplace, capsys, *memory, *more)
        assert f"without a plan: {why}" in notes.replace(
            str(tmp_path / "profile.json") + " is of a machine that ", ""
        )
        assert summary["predicted_step_s"] is None


def test_endurance_is_what_the_maker_allows_over_what_a_step_writes(workplace, capsys, tmp_path):
    machine = load_hardware("laptop-8gb")
    _, summary, notes = run(
        workplace, capsys, *EMULATED, "--host-memory", "17MB", "--saved-activations", "storage"
    )
    assert "\nendurance " in notes
    assert summary["written_bytes_per_step"] * 4 == pytest.approx(summary["written_gb"] * 1e9)
    assert summary["written_bytes_per_step"] > 0
    assert summary["endurance_steps"] == pytest.approx(1200e12 / summary["written_bytes_per_step"])
    assert endurance_steps(machine, 1e12) == 1200
    assert "1 GB written a step; lasts 1,200,000 steps" in endurance_lines(machine, 1e9)[0]
    unknown = load_hardware("laptop-8gb", ["drives.0.endurance_nbytes=null"])
    assert "does not know" in endurance_lines(unknown, 1e9)[0]


@pytest.mark.parametrize("tier", ["recompute", "host", "storage"])
def test_options_that_are_given_stay_as_given(workplace, capsys, tier):
    saved = workplace / "plan.json"
    options = ("--saved-activations", tier, "--micro-batches", "2", "--save-plan", str(saved))
    run(workplace, capsys, *EMULATED, *options)
    plan = Plan.from_json(saved.read_text())
    assert plan.micro_batches == 2
    assert {o for block in plan.activations for name, o in block.items() if name != INPUT} == {tier}


@pytest.mark.parametrize("tier", ["device", "host", "storage"])
def test_block_inputs_wait_where_the_option_says(workplace, capsys, tier):
    saved = workplace / "plan.json"
    run(workplace, capsys, *EMULATED, "--activations", tier, "--save-plan", str(saved))
    assert {block[INPUT] for block in Plan.from_json(saved.read_text()).activations} == {tier}


def test_a_limit_on_writes_is_planned_for_and_kept(workplace, capsys):
    saved = ("--saved-activations", "storage")
    _, free, _ = run(workplace, capsys, *EMULATED, "--host-memory", "17MB", *saved)
    limit = int(free["written_bytes_per_step"] * 0.9)
    _, summary, _ = run(workplace, capsys, *EMULATED, *saved, "--written-per-step", str(limit))
    assert 0 < summary["written_bytes_per_step"] <= limit


def test_a_measured_step_is_drawn_as_a_simulated_one_is(workplace, capsys):
    pytest.importorskip("matplotlib")
    trace, plot = workplace / "measured.json", workplace / "measured.png"
    run(workplace, capsys, *EMULATED, "--host-memory", "17MB", "--trace", str(trace), "--plot", str(plot))
    simulated = workplace / "simulated.json"
    arguments = ["--model", f"{workplace}/model", "--hardware", "laptop-8gb", "--batch", "2"]
    arguments += ["--fix", "states_on_device=0"]  # as an emulated device has it
    with pytest.raises(SystemExit):
        offload_main(["simulate", *arguments, "--sequence-length", "16", "--trace", str(simulated)])
    lanes = [
        {e["args"]["name"] for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "thread_name"}
        for path in (trace, simulated)
    ]
    assert "device compute" in lanes[0]
    assert lanes[0] & lanes[1] >= {"device compute", "bus H2D", "bus D2H"}
    kinds = {e["cat"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"}
    assert {"forward", "backward", "update"} <= kinds
    assert plot.read_bytes().startswith(b"\x89PNG")


def offload_main(arguments):
    from offload.cli import main

    return main(arguments)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--save-plan", "plan.json"], 2, "no plan to save"),
        (["--hardware", "pdp-11"], 2, "pdp-11"),
        (["--plan", "/nowhere/plan.json"], 2, "/nowhere/plan.json"),
        (["--plan", "/nowhere/plan.json", "--step-aside", "always"], 2, "/nowhere/plan.json"),
        (
            ["--plot", "step.drawing"],
            2,
            "step.drawing: .drawing is no format of pictures here; write FILE.png",
        ),
        (["--plan", "plan.json", "--micro-batches", "2"], 2, "--micro-batches 2 and --plan"),
        (["--written-per-step", "1GB"], 2, "--written-per-step is kept by planning"),
        (["--saved-activations", "disk"], 2, "saved_activations"),
        (
            ["--trace", "/dev/null/trace.json"],
            2,
            "--trace /dev/null/trace.json: there is no directory /dev/null",
        ),
        (["--hardware", "laptop-8gb", "--device", "cpu"], 2, "device with memory of its own"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_written(
    workplace, capsys, more, code, message
):
    assert finetune(workplace, *more) == code
    assert message in capsys.readouterr().err
    assert not (workplace / "store").exists() or os.listdir(workplace / "store") == []


def test_load_passes_the_planners_settings_on(workplace):
    model, _ = offload.load(
        str(workplace / "model"), make_adamw, device="emulated", step_aside="never", device_memory="2MB",
        host_memory="40MB", storage=[str(workplace / "store")], batch=(2, 16), hardware="laptop-8gb",
    )  # fmt: skip
    model.offload.close()
    assert model.offload.plan.batch_samples == 2


def make_adamw(parameters):
    import torch

    return torch.optim.AdamW(parameters, lr=1e-3)

"""`offload plan` and `offload simulate`, on a model and a machine of formula."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from offload.cli import app, sources
from offload.errors import BudgetError, ConfigError
from offload.planner.hardware import save_hardware
from offload.planner.plan import Budgets, Plan
from offload.profiling.workload import workload_of
from offload.schedule.fastest import make_simulated_plan
from offload.tiers.wear import Wear
from offload.update_rules import kernel_rule
from tests.planning import gpt, lohan_machine

RUN = ["--model", "4b", "--hardware", "rtx4090-2ssd", "--batch", "4", "--host-memory", "20GB"]
LAYERS, HIDDEN = 12, 5120


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Models and machines come from formulas; what the command asked for."""
    asked = {}

    def workload(source, tokens, *optimizer):
        asked["tokens"] = tokens
        return gpt(source, LAYERS, HIDDEN, tokens=tokens)

    def hardware(source, overrides):
        asked["overrides"] = overrides
        return lohan_machine(int(source.split("-")[1].removesuffix("ssd")))

    monkeypatch.setattr(sources, "workload", workload)
    monkeypatch.setattr(sources, "hardware", hardware)
    return asked


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_plan_says_step_limit_and_what_would_help() -> None:
    text = run("plan", *RUN)
    assert "The step is bound by the drives." in text
    assert "One more drive like the first would bring" in text
    assert "the drives' endurance lasts" in text
    assert "hardware TFLOPS" in text


def test_a_saved_plan_is_simulated_as_it_is(tmp_path) -> None:
    path = str(tmp_path / "plan.json")
    printed = json.loads(run("plan", *RUN, "--fix", "micro_batches=4", "--save", path, "--json"))
    saved = Plan.from_json((tmp_path / "plan.json").read_text())
    assert saved == Plan.model_validate(printed["plan"])
    assert saved.micro_batches == 4
    step = json.loads(run("simulate", *RUN, "--plan", path, "--json"))
    assert step["micro_batches"] == 4
    assert step["predicted_step_s"] == pytest.approx(saved.predicted.step_s)


def test_a_saved_plan_is_simulated_for_its_own_batch_and_sequence_length(tmp_path, asked) -> None:
    """Tokens a second were the plan's, and the arithmetic that of what is planned for without other settings."""
    path = str(tmp_path / "plan.json")
    run("plan", *RUN, "--sequence-length", "256", "--save", path)
    step = json.loads(run("simulate", *RUN[:4], "--plan", path, "--json"))
    assert asked["tokens"] == 256
    assert step["tokens_per_s"] == pytest.approx(4 * 256 / step["step_s"])
    assert step["step_s"] == pytest.approx(step["predicted_step_s"], rel=0.15)


def test_a_saved_plan_for_other_state_is_refused(monkeypatch, tmp_path) -> None:
    path = str(tmp_path / "plan.json")
    run("plan", *RUN, "--save", path)
    other = replace(gpt("4b", LAYERS, HIDDEN), rule=kernel_rule("lion", "fp32"))
    monkeypatch.setattr(sources, "workload", lambda *_: other)
    with pytest.raises(ConfigError, match="--optimizer that it was made with"):
        run("simulate", *RUN, "--plan", path)


def test_simulate_draws_traces_and_prints(tmp_path) -> None:
    picture, trace = tmp_path / "out.png", tmp_path / "out.json"
    text = run("simulate", *RUN, "--plot", str(picture), "--trace", str(trace))
    for word in ("tokens/s", "model TFLOPS", "device waits", "peak", "endurance"):
        assert word in text
    assert picture.stat().st_size > 10_000
    assert any(e["ph"] == "X" for e in json.loads(trace.read_text())["traceEvents"])


def test_simulate_in_json_adds_up() -> None:
    step = json.loads(run("simulate", *RUN, "--json"))
    assert step["tokens_per_s"] == pytest.approx(4 * 1024 / step["step_s"])
    assert step["busy_s"]["compute"] + sum(step["stall_s"].values()) == pytest.approx(step["step_s"])
    theirs = json.loads(run("simulate", *RUN, "--policy", "lohan", "--json"))
    assert theirs["policy"] == "LoHan"
    assert theirs["step_s"] > 1.2 * step["step_s"]
    assert theirs["hardware_tflops"] > theirs["model_tflops"]


@pytest.mark.slow
def test_settings_reach_the_sources(asked) -> None:
    run("plan", *RUN, "--sequence-length", "512", "--override", "dram_bytes_per_s=5e10")
    assert asked == {"tokens": 512, "overrides": ["dram_bytes_per_s=5e10"]}


def test_clipping_defers_the_updates() -> None:
    assert "ahead of the block's next forward" in run("plan", *RUN, "--clip")


def test_what_cannot_be_is_said(tmp_path) -> None:
    with pytest.raises(BudgetError, match="device_memory="):
        run("plan", *RUN, "--device-memory", "2GB")
    with pytest.raises(ConfigError, match="write name=value"):
        run("plan", *RUN, "--fix", "micro_batches")
    with pytest.raises(ConfigError, match="policy 'deepspeed' is not known"):
        run("simulate", *RUN, "--policy", "deepspeed")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no\.json: this is no saved plan, as .*: Field required$"):
        run("simulate", *RUN, "--plan", str(tmp_path / "no.json"))
    (tmp_path / "no.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"no\.json: this is no saved plan, as .*can't decode"):
        run("simulate", *RUN, "--plan", str(tmp_path / "no.json"))
    for wrong in ("boundary_on_device=maybe", "activations_on_device=no", "params_host_fraction=true"):
        with pytest.raises(ConfigError, match="it must be"):
            run("plan", *RUN, "--fix", wrong)


@pytest.mark.parametrize("batch", [10**9, 10**23])
def test_a_batch_too_large_for_any_machine_is_refused(batch) -> None:
    with pytest.raises(ConfigError, match="give a smaller batch"):
        run("plan", *RUN, "--batch", str(batch))


def test_rates_at_which_a_step_never_ends_are_refused() -> None:
    work, machine = gpt("small", 4, 512, tokens=64), lohan_machine(1)
    machine = machine.model_copy(update={"launch_overhead_s": 1e308})
    budgets = Budgets(machine.device_memory_nbytes, machine.host_memory_nbytes)
    with pytest.raises(ConfigError, match="a step never ends"):
        make_simulated_plan(work, machine, budgets, batch_samples=8)


@pytest.mark.parametrize("tokens", [0, 10**11])
def test_a_sequence_too_long_to_be_traced_is_refused(tokens) -> None:
    with pytest.raises(ConfigError, match="tokens: give 1 to"):
        workload_of("smollm2-135m", tokens)


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize("option", ["--written-per-step", "--storage-limit"])
@pytest.mark.parametrize("part", ["10%", "-5GB"])
def test_a_part_of_what_has_no_total_is_refused(command, option, part) -> None:
    """It counted from nothing: 10% was a limit of 0 bytes."""
    with pytest.raises(ConfigError, match=f"^{option} '{part}': .* write bytes, as in 500MB or 20GB"):
        run(command, *RUN, f"{option}={part}")


@pytest.mark.parametrize(
    "options", [("plan", "--save"), ("simulate", "--plot"), ("simulate", "--trace")], ids=lambda o: o[1]
)
def test_files_that_cannot_be_written_are_refused_before_anything_is_planned(monkeypatch, tmp_path, options):
    monkeypatch.setattr(sources, "workload", None)
    command, option = options
    for place, message in ((tmp_path, "name a file"), (tmp_path / "no" / "file.png", "make it first")):
        with pytest.raises(ConfigError, match=f"^{option} .*{message}"):
            run(command, *RUN, option, str(place))


def test_choices_are_read_as_numbers_truth_or_words() -> None:
    found = sources.fixed_choices(["a=3", "b=0.5", "c=False", "d=save"])
    assert found == {"a": 3, "b": 0.5, "c": False, "d": "save"}


@pytest.mark.slow
def test_durable_steps_are_planned_for_and_counted() -> None:
    """12 bytes a parameter written whatever host memory holds; 24 on storage."""
    numel = gpt("4b", LAYERS, HIDDEN).numel
    durable = json.loads(run("plan", *RUN, "--durability", "step", "--json"))["plan"]
    assert durable["predicted"]["bytes"]["written"] == pytest.approx(12 * numel)
    assert durable["predicted"]["peak_nbytes"]["storage"] == pytest.approx(24 * numel, rel=0.01)
    saved = json.loads(run("plan", *RUN, "--json"))["plan"]
    assert saved["predicted"]["bytes"]["written"] < 0.9 * 12 * numel
    assert "every step is kept" in run("plan", *RUN, "--durability", "step")
    with pytest.raises(BudgetError, match="of storage"):
        run("plan", *RUN, "--durability", "step", "--storage-limit", "65GB")
    with pytest.raises(ConfigError, match="none, checkpoint or step"):
        run("plan", *RUN, "--durability", "always")


@pytest.mark.slow
def test_directories_say_what_is_free_and_what_endurance_is_left(monkeypatch, tmp_path) -> None:
    """A drive of which half is used lasts half as many steps; what is free there is a limit."""
    (tmp_path / "second").mkdir()
    there = ("--storage", str(tmp_path), "--storage", str(tmp_path / "second"))
    monkeypatch.setattr(sources, "free_nbytes", lambda directories: 10**12)
    monkeypatch.setattr(sources, "wear_of", lambda directory: Wear("/dev/x", 0.5, 10**12))
    new = json.loads(run("plan", *RUN, "--json"))["explanation"]["endurance_steps"]
    used = json.loads(run("plan", *RUN, *there, "--json"))["explanation"]["endurance_steps"]
    assert used == pytest.approx(new / 2)
    monkeypatch.setattr(sources, "wear_of", lambda directory: "smartctl is not installed")
    assert json.loads(run("plan", *RUN, *there, "--json"))["explanation"]["endurance_steps"] == new
    monkeypatch.setattr(sources, "free_nbytes", lambda directories: 10**9)
    with pytest.raises(BudgetError, match="of storage"):
        run("plan", *RUN, *there)
    with pytest.raises(ConfigError, match="names 1 directories"):
        run("plan", *RUN, "--storage", str(tmp_path))


def test_buffers_of_the_model_are_taken_from_a_device_with_memory_of_its_own():
    machine, work = lohan_machine(2), replace(gpt("4b", LAYERS, HIDDEN, tokens=64), stays_nbytes=1 << 30)
    texts = sources.BudgetTexts("10GB", "20GB", None, None, False)
    own = texts.of(machine, replace(work, stays_nbytes=0)).device_nbytes
    assert texts.of(machine, work).device_nbytes == own - (1 << 30)
    shared = machine.model_copy(update={"shares_host": True})
    assert texts.of(shared, work).device_nbytes == 10_000_000_000


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_without_hardware_this_machines_own_profile_is_planned_for(monkeypatch, tmp_path, command):
    monkeypatch.undo()
    monkeypatch.setattr(sources, "workload", lambda source, tokens, *_: gpt(source, 4, 512, tokens=tokens))
    monkeypatch.setenv("OFFLOAD_PROFILE", str(tmp_path / "profile.json"))
    with pytest.raises(ConfigError, match="run `offload probe --storage DIR`"):
        run(command, "--model", "tiny")
    save_hardware(lohan_machine(1).model_copy(update={"name": "my own"}), str(tmp_path / "profile.json"))
    assert "my own" in run(command, "--model", "tiny")


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_on_a_terminal_a_command_says_what_it_is_doing_and_elsewhere_nothing(
    command, monkeypatch, tmp_path
) -> None:
    def told() -> str:
        with open(tmp_path / "told", "w+") as stderr:
            monkeypatch.setattr("sys.stderr", stderr)
            app([command, *RUN], standalone_mode=False)
            stderr.seek(0)
            return stderr.read()

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert told() == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    assert "looking for the fastest plan ..." in told()

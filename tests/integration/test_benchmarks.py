"""The benchmark scripts run as they stand, small, so that they are ready on the machine they are meant for."""

import json
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_gpu_benchmark_trains_on_an_emulated_device_with_the_same_losses_everywhere(tmp_path):
    report = tmp_path / "rows.json"
    command = [
        sys.executable, str(BENCHMARKS / "gpu_train.py"), "--device", "emulated", "--model", "tiny", "--tokens", "32",
        "--batch", "4", "--micro-batch", "2", "--steps", "2", "--device-memory-gb", "0.05", "--host-memory-gb", "0.05",
        "--storage", str(tmp_path), "--json", str(report),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=100, cwd=BENCHMARKS.parent)
    rows = {row["name"].rpartition("_")[2]: row for row in json.loads(report.read_text())["rows"]}
    assert rows["host"]["loss"] == rows["storage"]["loss"]
    assert abs(rows["gpu"]["loss"] - rows["host"]["loss"]) < 0.02
    for row in rows.values():
        assert row["tokens_per_s"] > 0
        assert row["hardware_tflops"] > row["model_tflops"] > 0


@pytest.mark.slow
def test_the_swapping_benchmark_runs_all_three_policies_with_the_same_bits(tmp_path):
    report = tmp_path / "rows.json"
    command = [
        sys.executable, str(BENCHMARKS / "activation_swapping.py"), "--hidden", "64", "--layers", "3", "--tokens", "16",
        "--batch", "4", "--micro-batches", "2", "--rounds", "1", "--probe-s", "0.2", "--host-memory", "100000000",
        "--json", str(report),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=100, cwd=BENCHMARKS.parent)
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    assert all(row["same_bits"] for row in rows.values())
    assert rows["recompute_all"]["swapped_bytes_per_step"] == 0
    assert rows["swap_all"]["planned_bytes"]["recompute"] == 0
    assert rows["swap_all"]["swapped_bytes_per_step"] > rows["planned"]["swapped_bytes_per_step"]


@pytest.mark.slow
def test_the_durability_benchmark_gives_a_row_for_each_level(tmp_path):
    report = tmp_path / "rows.json"
    command = [
        sys.executable, str(BENCHMARKS / "durability.py"), "--model", "tiny", "--rounds", "2", "--tokens", "8",
        "--storage", str(tmp_path), "--device-memory", "60MB", "--host-memory", "32MB", "--json", str(report),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=100, cwd=BENCHMARKS.parent)
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows["level_step"]["written_bytes_per_param"] > 11
    assert rows["checkpoint"]["bytes_per_param"] > 11
    assert rows["checksums"]["gb_per_s_one_core"] > 0.1

"""The one table of all rows of the GPU benchmarks has every row, its figures and its reasons, in few characters."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_table import CHARACTERS_MAX, rows_in, table

TRAINED = {
    "name": "gpu_train_1b_32768_storage+all", "step_s": 16.25, "tokens_per_s": 2016.0, "hardware_tflops": 18.5,
    "of_gpu": 0.0812, "of_best": 0.973, "of_floor": 0.971, "largest_floor": "storage", "device_peak_gb": 7.61,
    "budget_gb": 8.0, "host_share": 0.0, "stall_s": {"fetch": 9.1, "load": 0.001},
}  # fmt: skip
MADE = [
    {"name": "gpu_rates_dram", "value": 71.25, "unit": "GB/s"},
    TRAINED,
    {"name": "gpu_train_3b_32768_gpu", "error": "OutOfMemoryError: CUDA out of memory"},
    {"name": "gpu_sweep_1b_16384_host", "not_run": "no time was left"},
    {"name": "gpu_profile_1b_32768_host", "step_s": 1.3, "gap_share": 0.071, "between_blocks_share": 0.012,
     "turn_share": 0.055, "calls": {"cudaMalloc": 2}},
    {"name": "gpu_giant_llama-70b_4_layers", "step_s": 4.0, "tokens_per_step": 16384, "predicted_step_s": 3.5,
     "update_s": 0.5, "predicted_update_s": 0.75},
    {"name": "gpu_giant_llama-70b_own_rates", "work_tflops": {"forward": 612.0}},
]  # fmt: skip


def line_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(name)).split()


def test_every_row_is_in_the_table_with_its_figures_or_why_it_has_none():
    text = table(MADE)
    head = text.splitlines()[0].split()
    assert len(text.splitlines()) == 1 + len(MADE)
    trained = dict(zip(head, line_of(text, "train_1b"), strict=False))
    assert trained["step_s"] == "16.2"
    assert (trained["ktok/s"], trained["best"], trained["longest"]) == ("2.02", "0.973", "storage")
    assert (trained["dev"], trained["GB"], trained["host"], trained["keep"]) == ("7.61", "8", "0", "-")
    assert "stall fetch 9.1" in text
    assert "load" not in text
    assert "71.25 GB/s" in text
    assert "CUDA out of memory" in text
    assert "not run: no time was left" in text
    assert "gap 7.1%, between 1.2%, turn 5.5%, calls cudaMalloc" in text
    assert "measured/predicted s 4/3.5 u 0.5/0.75" in text
    assert "forward 612" in text


@pytest.mark.parametrize("n_rows", [80, 1000])
def test_the_table_stays_within_what_comes_back(n_rows):
    rows = [TRAINED | {"name": f"gpu_train_1b_{n}_host", "error": "e" * 400} for n in range(n_rows)]
    text = table(rows)
    assert len(text) <= CHARACTERS_MAX
    shown = [line for line in text.splitlines() if line.startswith("train_")]
    if n_rows == 80:
        assert len(shown) == n_rows
    else:
        assert text.endswith(f"... {n_rows - len(shown)} rows more are in the files")


def test_rows_are_those_of_the_gpu_benchmarks_whole_files(tmp_path):
    (tmp_path / "gpu_train_1b.json").write_text(json.dumps({"rows": [TRAINED]}))
    (tmp_path / "gpu_hardware.json").write_text(json.dumps({"name": "a card"}))
    (tmp_path / "gpu_broken.json").write_text('{"rows": [')
    (tmp_path / "launch.json").write_text(json.dumps({"rows": [{"name": "another benchmark's"}]}))
    assert rows_in(tmp_path) == [TRAINED]

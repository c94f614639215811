"""The example script trains, resumes and exports, as it stands, with the JSON beside it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_deepspeed_script_runs_in_under_two_minutes(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "deepspeed_config.py"), "--out", str(tmp_path / "out")]
    command += ["--deepspeed_config", str(ROOT / "examples" / "deepspeed_config.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["first_loss"] > 5.0
    assert report["last_loss"] < 3.0
    assert report["resumed_from"].endswith("global_step20")
    assert report["micro_batches"] == 80
    assert report["gb_written"] > 0
    assert "step=40, skipped=0" in done.stderr
    assert "aio.thread_count is an older spelling" in done.stderr
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert not list((tmp_path / "nvme").glob("*"))  # the store went with the run


def test_the_example_is_the_published_script_but_for_its_import():
    lines = (ROOT / "examples" / "deepspeed_config.py").read_text().splitlines()
    assert [line for line in lines if "offload" in line and "import" in line] == [
        "import offload.deepspeed as deepspeed  # was: import deepspeed"
    ]

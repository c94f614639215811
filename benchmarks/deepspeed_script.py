"""The same training script under DeepSpeed and here, only the import changed: losses, seconds a step, peak memory.

    python benchmarks/deepspeed_script.py --storage DIR --peer-python VENV/bin/python --json FILE

ZeRO stage 3 with the optimizer on NVMe and the parameters in DRAM, bf16, clipping, from one JSON file that both read
(benchmarks/deepspeed_loop.py is the script). Plain torch in memory with the same arithmetic is the third side: how far
it is from DeepSpeed is what rounding alone does, the noise that our difference from DeepSpeed is held against. Sides
run in turn, each a process of its own, `--rounds` times; the first two steps of each are not timed. The peer's Python
needs torch, deepspeed, ninja and libaio; its operations compile at first use. Without --peer-python only our side and
torch run.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import common
from deepspeed_configuration import configuration

LOOP = pathlib.Path(__file__).with_name("deepspeed_loop.py")
UNTIMED_STEPS = 2
BF16_ROUNDING = 2.0**-8
"""Largest relative change by one rounding to bf16."""


def run(
    python: str, engine: str, wanted: dict[str, Any], options: argparse.Namespace, *more: str
) -> dict[str, Any]:
    """One side's answer, for a configuration; `more` goes to the script."""
    environment = dict(os.environ)
    environment["PATH"] = os.path.dirname(python) + os.pathsep + environment["PATH"]
    environment["PYTHONPATH"] = os.pathsep.join([str(LOOP.parents[1]), environment.get("PYTHONPATH", "")])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(wanted, config)
        config.flush()
        command = [python, str(LOOP), "--engine", engine, "--config", config.name]
        command += ["--model", options.model, "--steps", str(options.steps), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{engine} stopped:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def joined(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's rounds as one: all timed steps, the largest memory. The losses must be the same each time."""
    if any(side["losses"] != rounds[0]["losses"] for side in rounds):
        raise SystemExit(f"two rounds of one side have other losses: {[side['losses'] for side in rounds]}")
    timed = [seconds for side in rounds for seconds in side["step_s"][UNTIMED_STEPS:]]
    untimed = rounds[0]["step_s"][:UNTIMED_STEPS]
    peak_nbytes = max(side["rss_over_baseline_bytes"] for side in rounds)
    return rounds[0] | {"step_s": untimed + timed, "rss_over_baseline_bytes": peak_nbytes}


def row_of(engine: str, side: dict[str, Any], sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A side's figures, and its distance from DeepSpeed's losses."""
    timed = side["step_s"][UNTIMED_STEPS:] or side["step_s"]
    row = {
        "name": f"deepspeed_script_{engine.replace('.', '_')}",
        "parameters": side["parameters"],
        "step_s": common.median(timed),
        "step_s_spread": common.spread(timed),
        "rss_over_baseline_bytes": side["rss_over_baseline_bytes"],
        "read_bytes_per_step": side["read_bytes_per_step"],
        "written_bytes_per_step": side["written_bytes_per_step"],
        "losses": [round(loss, 6) for loss in side["losses"]],
    }
    reference = sides.get("deepspeed")
    if reference is not None and engine != "deepspeed":
        apart = [abs(a - b) for a, b in zip(side["losses"], reference["losses"], strict=True)]
        row["loss_difference_max"] = max(apart)
        row["loss_difference_median"] = common.median(apart)
        row["bf16_rounding_of_loss"] = BF16_ROUNDING * common.median(reference["losses"])
        row["speedup"] = common.median(reference["step_s"][UNTIMED_STEPS:]) / row["step_s"]
        row["rss_ratio"] = row["rss_over_baseline_bytes"] / reference["rss_over_baseline_bytes"]
    return row


def main() -> None:
    """Run the sides, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--peer-python", help="a Python that has DeepSpeed")
    parser.add_argument("--model", default="151m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1, help="how often each side runs, in turn")
    parser.add_argument("--json")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="deepspeed-script-", dir=options.storage)
    pythons = {"torch": sys.executable, "offload.deepspeed": sys.executable}
    if options.peer_python:
        pythons = {"deepspeed": options.peer_python, **pythons}
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in pythons}
    try:
        for _ in range(options.rounds):
            for engine, python in pythons.items():
                theirs = tempfile.mkdtemp(dir=directory)
                found[engine].append(run(python, engine, configuration(theirs), options))
                shutil.rmtree(theirs)
        about = common.about(directory, backend=common.backend(directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    sides = {engine: joined(rounds) for engine, rounds in found.items()}
    rows = [row_of(engine, side, sides) | about for engine, side in sides.items()]
    common.write_rows(options.json, rows, common.command_line(__file__, sys.argv[1:]))


if __name__ == "__main__":
    main()

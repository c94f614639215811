"""Simulated throughput of LoHan's policy against its published tables, and of this library's plan on the same machine.

    python benchmarks/simulator_literature.py --json benchmarks/results/simulator_literature.json

Pure arithmetic: the same figures on every machine, in about a minute.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from common import ROOT, write_rows

sys.path.insert(0, str(ROOT))

from offload.planner.hardware import Hardware
from offload.planner.peers import lohan_plan, lohan_workload
from offload.planner.plan import Budgets
from offload.planner.workload import Workload
from offload.schedule.fastest import make_simulated_plan
from offload.schedule.run import SimulatedStep, simulate_plan
from tests.planning import PUBLISHED_ROWS, gpt, lohan_machine

DATA_SHEET_ADAM_PARAMS_PER_S = 300.3392e9 / 28
"""DRAM bandwidth over the bytes of an update: what 52 cores would do if only memory limited them."""
DATA_SHEET_DEVICE_ADAM_PARAMS_PER_S = 0.8 * 1008e9 / 28
"""The RTX 4090's memory bandwidth over the bytes of an update; LoHan's policy makes none there."""


def lohan(work: Workload, machine: Hardware, batch: int, host_gb: int | None = None) -> SimulatedStep:
    """LoHan's policy."""
    work = lohan_workload(work)
    host_nbytes = None if host_gb is None else host_gb * 10**9
    plan = lohan_plan(work, machine, batch_samples=batch, host_memory_nbytes=host_nbytes)
    return simulate_plan(plan, work, machine)


def ours(work: Workload, machine: Hardware, batch: int, **fixed: Any) -> tuple[SimulatedStep, float]:
    """This library's plan within 95 % of the device's memory and 90 % of the host's; the step that was predicted."""
    machine = machine.model_copy(update={"device_adam_params_per_s": DATA_SHEET_DEVICE_ADAM_PARAMS_PER_S})
    budgets = Budgets(int(0.95 * machine.device_memory_nbytes), int(0.9 * machine.host_memory_nbytes))
    plan = make_simulated_plan(work, machine, budgets, fixed, batch_samples=batch)
    if plan.predicted is None:
        raise SystemExit("the planner gave no prediction")
    return simulate_plan(plan, work, machine), plan.predicted.step_s


def main_stall(step: SimulatedStep) -> str:
    """What the device waits for most."""
    if not step.stall_s:
        return "nothing"
    cause, seconds = max(step.stall_s.items(), key=lambda item: item[1])
    return f"{cause} {seconds / step.step_s:.0%}"


def published_rows(work: Workload) -> list[dict[str, Any]]:
    """Both tables, row by row."""
    rows = []
    for batch, drives, tflops in PUBLISHED_ROWS:
        machine = lohan_machine(drives)
        theirs = lohan(work, machine, batch)
        own, predicted_s = ours(work, machine, batch)
        fast = lohan_machine(drives, adam_params_per_s=DATA_SHEET_ADAM_PARAMS_PER_S)
        own_fast, _ = ours(work, fast, batch)
        own_small, _ = ours(work, lohan_machine(drives, 128), batch)
        rows.append(
            {
                "name": f"13b-batch{batch}-{drives}ssd",
                "published_hardware_tflops": tflops,
                "hardware_tflops": theirs.hardware_tflops,
                "error_percent": 100 * (theirs.hardware_tflops / tflops - 1),
                "step_s": theirs.step_s,
                "stall": main_stall(theirs),
                "device_peak_gb": theirs.peak_nbytes["device"] / 1e9,
                "offload_step_s": own.step_s,
                "offload_predicted_step_s": predicted_s,
                "offload_model_tflops": own.model_tflops,
                "offload_stall": main_stall(own),
                "speedup": theirs.step_s / own.step_s,
                "offload_128gb_step_s": own_small.step_s,
                "speedup_128gb": theirs.step_s / own_small.step_s,
                "offload_fast_adam_step_s": own_fast.step_s,
                "speedup_fast_adam": theirs.step_s / own_fast.step_s,
            }
        )
    return rows


def larger_rows() -> list[dict[str, Any]]:
    """175 B parameters, 12 drives."""
    work, rows = gpt("175b", 96, 12288), []
    for batch, host_gb in ((16, 256), (32, 256), (64, 256)):
        machine = lohan_machine(12, host_gb)
        theirs = lohan(work, machine, batch)
        own, predicted_s = ours(work, machine, batch)
        not_mixed, _ = ours(work, machine, batch, update="backward")
        fast = lohan_machine(12, host_gb, adam_params_per_s=DATA_SHEET_ADAM_PARAMS_PER_S)
        own_fast, _ = ours(work, fast, batch)
        rows.append(
            {
                "name": f"175b-batch{batch}-{host_gb}GB",
                "hardware_tflops": theirs.hardware_tflops,
                "step_s": theirs.step_s,
                "stall": main_stall(theirs),
                "device_peak_gb": theirs.peak_nbytes["device"] / 1e9,
                "offload_step_s": own.step_s,
                "offload_predicted_step_s": predicted_s,
                "offload_not_mixed_step_s": not_mixed.step_s,
                "offload_model_tflops": own.model_tflops,
                "offload_stall": main_stall(own),
                "speedup": theirs.step_s / own.step_s,
                "offload_fast_adam_step_s": own_fast.step_s,
                "speedup_fast_adam": theirs.step_s / own_fast.step_s,
            }
        )
    return rows


def sensitivity_rows(work: Workload) -> list[dict[str, Any]]:
    """How far the largest error of the ten rows moves with the one fitted figure, and with overlapped updates."""
    rows = []
    for adam in (0.9e9, 1.1e9, 1.25e9, 1.4e9, 1.6e9, DATA_SHEET_ADAM_PARAMS_PER_S):
        errors = [
            lohan(work, lohan_machine(drives, adam_params_per_s=adam), batch).hardware_tflops / tflops - 1
            for batch, drives, tflops in PUBLISHED_ROWS
        ]
        rows.append(
            {
                "name": f"adam-{adam / 1e9:.2f}",
                "adam_params_per_s": adam,
                "worst_error_percent": 100 * max(errors, key=abs),
                "mean_absolute_error_percent": 100 * sum(map(abs, errors)) / len(errors),
            }
        )
    return rows


def main() -> None:
    """Print and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    work = gpt("13b", 40, 5120)
    rows = published_rows(work) + larger_rows() + sensitivity_rows(work)
    write_rows(arguments.json, rows, command="python benchmarks/simulator_literature.py --json FILE")


if __name__ == "__main__":
    main()

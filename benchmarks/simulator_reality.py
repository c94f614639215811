"""Simulated against measured steps on this machine: two models, two batches, placements from DRAM to the drive.

    python benchmarks/simulator_reality.py --storage DIR --json benchmarks/results/simulator_reality.json

For each configuration a fixed plan runs. Rounds of a look at the machine (the model's own rates, AdamW, the drive, and
what they take from each other), then a few steps, so that rates and steps are of the same minute; the first step
after a look is not counted, because nothing was left in flight. Each round's rates give one prediction; the row
compares medians. `--trace FILE` and `--plot FILE` lay one configuration's measured and simulated spans side by side.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from common import ROOT, about, command_line, median, write_rows

sys.path.insert(0, str(ROOT))

import torch
from llama_shaped import LlamaShaped, Shape
from measured_run import MeasuredRun, fixed_plan, staging_nbytes
from torch import nn

from offload.planner.hardware import Hardware
from offload.planner.workload import Workload
from offload.profiling import compute_probe
from offload.profiling.block_probe import BlockProbe, measure
from offload.profiling.compute_probe import UpdateLoop
from offload.profiling.storage_probe import DriveLoop
from offload.profiling.workload import profile_model
from offload.schedule.run import SimulatedStep, simulate_plan
from offload.schedule.trace import draw_side_by_side, write_side_by_side

TOKENS = 64
TIERS = ("device", "host", "storage")
SWAPPED = {"activations": "save", "activations_on_device": False, "activations_host_fraction": 0.0}
ALWAYS = {"micro_batches": 1, "prefetch_blocks": 2, "grad_buffers": 2, "activations": "recompute"}


def llama() -> nn.Module:
    """34 M parameters in bf16: six layers of 4.2 M, an untied head."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaShaped(Shape(hidden=512, layers=6, intermediate=2048, heads=8, vocab=8192))
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.02)
    return model


def gpt2() -> nn.Module:
    """29 M parameters in fp32: eight layers of 3.2 M, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=512, n_layer=8, n_head=8, vocab_size=8192, n_positions=TOKENS, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, torch.Tensor], torch.Tensor]]] = {
    "llama": (llama, lambda model, ids: model(ids)),
    "gpt2": (gpt2, lambda model, ids: model(input_ids=ids, labels=ids).loss),
}


def placed(update: str, params: float, states: float, **more: Any) -> dict[str, Any]:
    """Fixed choices of one configuration."""
    fixed = {**ALWAYS, "update": update, "params_host_fraction": params, "states_host_fraction": states}
    if update == "deferred":
        fixed["grads_host_fraction"] = params
    return {**fixed, **more}


PLACEMENTS = {
    "host": placed("backward", 1.0, 1.0),
    "half": placed("backward", 0.5, 0.5),
    "storage": placed("backward", 0.0, 0.0),
    "storage-deferred": placed("deferred", 0.0, 0.0),
    "storage-saved": placed("backward", 0.0, 0.0, activations="save"),
    "all-at-once": placed("deferred", 0.5, 0.0, micro_batches=2, inputs="storage", **SWAPPED),
}
"""`all-at-once`: micro-batches, activations swapped to storage, clipping, updates in the next forward."""
MAX_GRAD_NORM = {"all-at-once": 0.1}
CONFIGURATIONS = [
    ("llama", 2, "host"), ("llama", 2, "half"), ("llama", 2, "storage"), ("llama", 2, "storage-deferred"),
    ("llama", 6, "host"), ("llama", 6, "storage"), ("llama", 6, "storage-saved"), ("llama", 6, "all-at-once"),
    ("gpt2", 2, "host"), ("gpt2", 2, "storage"), ("gpt2", 4, "storage-deferred"),
    ("gpt2", 4, "all-at-once"),
]  # fmt: skip


@dataclass
class Looks:
    """What one configuration has shown so far."""

    hardware: list[Hardware] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    predicted_s: list[float] = field(default_factory=list)


class Machine:
    """Measures this machine again and again."""

    def __init__(self, storage: str) -> None:
        self.updates = UpdateLoop()
        self.drives = DriveLoop([storage])
        self.dram_bytes_per_s = compute_probe.dram_bytes_per_s(1.0)

    def look(self, bench: Bench) -> Hardware:
        """The machine as it is now, for one model and micro-batch."""
        found = measure(bench.probe, self.updates, self.drives.stream)
        products = compute_probe.matmul_flops_per_s(
            bench.shapes, bench.micro_rows, getattr(torch, bench.dtype), torch.device("cpu"), 0.3
        )
        return Hardware(
            name="this machine",
            source="probe",
            shares_host=True,
            device_memory_nbytes=1 << 33,
            host_memory_nbytes=1 << 33,
            matmul_flops_per_s={bench.dtype: products},
            dram_bytes_per_s=self.dram_bytes_per_s,
            launch_overhead_s=0.0,  # it is in the rates
            drives=(self.drives.measure(0.8),),
            **asdict(found),
        )

    def close(self) -> None:
        """Remove what it has made."""
        self.updates.close()
        self.drives.close()


class Bench:
    """One model, batch and micro-batch with its probe; the configurations share them."""

    def __init__(
        self, kind: str, batch: int, micro_batches: int, build: Callable[[], nn.Module] | None = None
    ) -> None:
        standard, loss = MODELS[kind]
        build = build or standard
        model = build()
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        ids = torch.randint(0, 8192, (batch, TOKENS))
        self.build, self.batch = build, batch
        micro = ids[: batch // micro_batches]
        self.loss = lambda model: loss(model, ids)
        self.workload: Workload = profile_model(model, TOKENS, name=kind)
        self.shapes, self.micro_rows = compute_probe.matmul_shapes(model), len(micro) * TOKENS
        self.probe = BlockProbe(model, self.workload, len(micro), lambda model: loss(model, micro))
        self._first: Hardware | None = None

    def first_look(self, here: Machine) -> Hardware:
        """What the plans are made for; their choices are fixed."""
        if self._first is None:
            self._first = here.look(self)
        return self._first


def configuration(
    name: str, bench: Bench, fixed: dict[str, Any], here: Machine, storage: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One row."""
    looks = Looks()
    limit = MAX_GRAD_NORM.get(name.split("-", 2)[2])
    plan = fixed_plan(bench.workload, bench.first_look(here), bench.batch, **fixed)
    with MeasuredRun(bench.build(), plan, storage, bench.loss, limit) as run:
        for _ in range(2):
            run.step()
        for _ in range(options.rounds):
            hardware = here.look(bench)
            looks.hardware.append(hardware)
            run.step()
            looks.step_s += [run.step() for _ in range(options.steps)]
            step = simulate_plan(plan, bench.workload, hardware, staging_nbytes=staging_nbytes())
            looks.predicted_s.append(step.step_s)
        moved, held = run.bytes_per_step(), run.peak_nbytes()
        if options.trace_of == name:
            side_by_side(run, step, options)
    return row_of(name, looks, step, moved, held)


def row_of(name: str, looks: Looks, step: SimulatedStep, moved: Any, held: dict[str, int]) -> dict[str, Any]:
    """Measured and predicted, side by side."""
    measured_s, predicted_s = median(looks.step_s), median(looks.predicted_s)
    row = {
        "name": name,
        "step_s": measured_s,
        "predicted_step_s": predicted_s,
        "error_percent": 100 * (predicted_s / measured_s - 1),
        "fastest_step_s": min(looks.step_s),
        "slowest_step_s": max(looks.step_s),
        "read_bytes": moved.read,
        "predicted_read_bytes": step.read_nbytes,
        "written_bytes": moved.written,
        "predicted_written_bytes": step.written_nbytes,
    }
    for tier in TIERS:
        row[f"{tier}_peak_bytes"], row[f"predicted_{tier}_peak_bytes"] = held[tier], step.peak_nbytes[tier]
        if held[tier]:
            row[f"{tier}_peak_error_percent"] = 100 * (step.peak_nbytes[tier] / held[tier] - 1)
    for kind, measured, predicted in (
        ("read", moved.read, step.read_nbytes),
        ("written", moved.written, step.written_nbytes),
    ):
        row[f"{kind}_error_percent"] = 100 * (predicted / measured - 1) if measured else 0.0
    for rate in (
        "compute_speed_beside_update",
        "update_speed_beside_compute",
        "compute_speed_beside_storage",
        "storage_speed_beside_compute",
    ):
        row[rate] = median([getattr(hardware, rate) for hardware in looks.hardware])
    row["matmul_flops_per_s"] = median([next(iter(h.matmul_flops_per_s.values())) for h in looks.hardware])
    row["forward_flops_per_s"] = median([h.work_flops_per_s["forward"] for h in looks.hardware])
    for rate in ("read_bytes_per_s", "write_bytes_per_s", "mixed_bytes_per_s"):
        row[f"drive_{rate}"] = median([getattr(hardware.drives[0], rate) for hardware in looks.hardware])
    return row


def side_by_side(run: MeasuredRun, step: SimulatedStep, options: argparse.Namespace) -> None:
    """Two measured steps; the second is laid beside the simulated one."""
    with run.engine.record() as spans:
        run.step()
        start_s = time.perf_counter()
        run.step()
    begin_s = start_s - run.engine.spans._origin_s
    if options.trace:
        write_side_by_side(options.trace, spans, step.spans, begin_s)
    if options.plot:
        draw_side_by_side(options.plot, spans, step.spans, begin_s)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row that says whether the simulator is right."""
    errors = [row["error_percent"] for row in rows]
    peaks = [row[key] for row in rows for key in row if key.endswith("_peak_error_percent")]
    moved = [abs(row[f"{kind}_error_percent"]) for row in rows for kind in ("read", "written")]
    return {
        "name": "summary",
        "n_configurations": len(rows),
        "worst_step_error_percent": max(errors, key=abs),
        "median_absolute_step_error_percent": median([abs(error) for error in errors]),
        "least_peak_error_percent": min(peaks),
        "most_peak_error_percent": max(peaks),
        "worst_bytes_error_percent": max(moved),
    }


def say(row: dict[str, Any], seconds: float) -> None:
    """Progress."""
    print(
        f"{row['name']}: {row['step_s']:.3f} s a step ({row['fastest_step_s']:.3f} to {row['slowest_step_s']:.3f}), "
        f"predicted {row['predicted_step_s']:.3f} ({row['error_percent']:+.1f} %); {seconds:.0f} s for this row",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Print and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default=os.getcwd())
    parser.add_argument("--json")
    parser.add_argument("--only", help="names of configurations, with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed in each round")
    parser.add_argument("--trace", help="Perfetto file of --trace-of")
    parser.add_argument("--plot", help="picture of --trace-of")
    parser.add_argument("--trace-of", default="llama-2-storage")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    storage = tempfile.mkdtemp(prefix="offload-bench-", dir=options.storage)
    chosen = [(f"{kind}-{batch}-{place}", kind, batch, place) for kind, batch, place in CONFIGURATIONS]
    wanted = options.only.split(",") if options.only else [name for name, *_ in chosen]
    benches: dict[tuple[str, int, int], Bench] = {}
    rows: list[dict[str, Any]] = []
    here = Machine(storage)
    try:
        for name, kind, batch, place in chosen:
            if name not in wanted:
                continue
            start_s = time.perf_counter()
            key = (kind, batch, PLACEMENTS[place]["micro_batches"])
            if key not in benches:
                benches = {key: Bench(*key)}
            rows.append(configuration(name, benches[key], PLACEMENTS[place], here, storage, options))
            gc.collect()  # a model refers to itself, and holds its arenas
            say(rows[-1], time.perf_counter() - start_s)
        facts = about(storage)
    finally:
        here.close()
        shutil.rmtree(storage, ignore_errors=True)
    command = command_line(sys.argv[0], sys.argv[1:])
    write_rows(options.json, [row | facts for row in [*rows, summary(rows)]], command)


if __name__ == "__main__":
    main()

"""Full fine-tune of a Llama-shaped model on one GPU within a few GB of `device_memory`, against everything on the GPU.

With --family transformers the model is Llama 3.2 as users have it (gpu_models.py); its loss is computed in chunks here.

Placements, one row each for each batch size:

    gpu           plain torch, all state on the device: bf16 parameters and moments, fused AdamW, layers recomputed
    gpu-keep      the same without recomputation, where it fits
    host          this library, all state in host memory
    storage       this library, state on storage and the least host memory; with --host-share, or where steps would take
                  too long for --row-seconds, a share of the state in host memory, which the row says (host_share)
    storage+all   the same with all state on storage, where there is time for the few steps that it takes
    host+plan, storage+plan    the same with what the planner chooses (needs --profile)
    gpu+compile, host+compile    with torch.compile for each block, which takes its time in the first steps
    host+noplan, storage+noplan    everything recomputed: without the plan that is made after the first step
    host+streamed                  no optimizer state stays in device memory
    deepspeed-cpu, deepspeed-nvme    DeepSpeed ZeRO-3, where it can be imported

Plain torch keeps 8 bytes a parameter where this library keeps 12 (fp32 masters and moments): it has less to do, which
is to its advantage. Each row has tokens/s, model TFLOPS (6 FLOPs a parameter and token, plus attention), hardware
TFLOPS (with recomputation), the peak of the allocator's reserve beside the budget, the process's peak memory, what the
launching thread waited for, allocations asked of the driver in the measured steps, the floors (gpu_common.py) and, for
all but plain torch, `of_gpu` and `of_gpu_keep`, those rows' seconds over its own, and `of_best`, the most that can be
asked of it (gpu_common.py).

    python benchmarks/gpu_train.py --model 1b --tokens-per-step 8192,32768 --profile FILE --json FILE
    python benchmarks/gpu_train.py --device emulated --tiny     # the same path without a GPU, in seconds
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import common
import gpu_common
import gpu_deepspeed
import torch
from gpu_common import Clock, Device, Rows
from gpu_models import FAMILIES, Family
from llama_shaped import SHAPES
from torch import nn

import offload
from offload.planner.hardware import Hardware
from offload.planner.workload import Workload
from offload.profiling.workload import profile_model

PLACEMENTS = ("gpu", "gpu-keep", "host", "storage")
COLUMNS = (
    "step_s", "tokens_per_s", "model_tflops", "hardware_tflops", "of_gpu", "of_gpu_keep", "of_best", "of_floor",
    "largest_floor", "host_share", "device_peak_gb", "budget_gb", "rss_gb", "driver_allocations", "stall_s",
)  # fmt: skip
WARM_UP_STEPS = 2
TINY = {
    "model": "tiny", "vocab": 512, "sequence": 32, "tokens_per_step": "128", "micro_tokens": 64, "steps": 2,
    "device_memory_gb": 0.05,
}  # fmt: skip
"""Options of --tiny."""
STATE_NBYTES = 12
TRIES = 2
"""Of a row: half the tokens on the device at once where they were too many; the row says how many. Plain torch then
accumulates two parts of the batch."""


@dataclass
class Run:
    """One placement being trained: `step` makes a step and gives its loss; `engine` is ours or None."""

    step: Callable[[torch.Tensor], torch.Tensor]
    engine: Any = None
    recomputes: bool = True
    updated: int = 0
    close: Callable[[], None] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What all rows of one batch size share."""

    family: Family
    batch: int
    options: argparse.Namespace
    device: Device
    hardware: Hardware | None
    workload: Workload
    storage: str
    micro_tokens: int
    parts: int = 1
    """Of the batch in plain torch, where all of it at once was too much."""

    @property
    def numel(self) -> int:
        """Parameters."""
        return sum(b.trainable_numel for b in self.workload.blocks) + self.workload.root_trainable_numel

    def name(self, placement: str) -> str:
        """Of a row."""
        return f"gpu_train_{self.family.name}_{self.batch * self.options.sequence}_{placement}"

    def flops(self, recomputes: bool) -> tuple[float, float]:
        """Model and hardware FLOPs of one step: backward is twice forward; what is recomputed runs once more."""
        blocks = self.batch * sum(b.flops_per_sample for b in self.workload.blocks)
        root = self.batch * self.workload.root_flops_per_sample
        again = blocks * recomputes + self.loss_flops_again
        return 3.0 * (blocks + root), 3.0 * (blocks + root) + again

    @property
    def loss_flops_again(self) -> float:
        """FLOPs of the head and the loss in one step's backward, where the model runs them again."""
        return self.batch * self.workload.root_flops_per_sample * self.family.recomputes_loss


def plain_step(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, n_samples: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Forward and backward of `n_samples` at once until the batch is through, then the update."""

    def step(tokens: torch.Tensor) -> torch.Tensor:
        parts = tokens.split(n_samples)
        total = torch.zeros((), device=tokens.device)
        for part in parts:
            loss = case.family.loss(model, part) / len(parts)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def on_gpu(case: Case, *, recompute: bool, compiled: bool) -> Run:
    """Plain torch."""
    model = case.family.make(recompute=recompute).to(case.device.torch_device)
    for layer in case.family.layers(model) if compiled else ():
        layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    n_samples = case.family.samples_at_once(case.batch, case.micro_tokens, case.options.sequence)
    n_samples = min(n_samples, -(-case.batch // case.parts))
    facts = {"tokens_at_once": n_samples * case.options.sequence}
    return Run(plain_step(case, model, optimizer, n_samples), recomputes=recompute, facts=facts)


def drive_seconds(case: Case, *, read_per_numel: float) -> float:
    """Seconds in which the drives read so many bytes a parameter and write all state; 0 where they are not known."""
    if case.hardware is None or not case.hardware.drives:
        return 0.0
    format_ = gpu_common.state_format_of(case.workload)
    rates = gpu_common.CostModel(case.workload, case.hardware, format_, case.batch).rates.storage
    if rates is None:
        return 0.0
    return float(rates.seconds(read_per_numel * case.numel, STATE_NBYTES * case.numel))


def least_seconds(case: Case, placement: str) -> float:
    """What a row takes at least: of `storage+all`, what the drive needs for its first bytes and one measured step."""
    if placement != "storage+all":
        return 0.0
    steps_s = (WARM_UP_STEPS + 1) * drive_seconds(case, read_per_numel=14)
    return case.options.construction_s + drive_seconds(case, read_per_numel=0) + steps_s


def host_share_within(case: Case) -> float:
    """The least share of the state in host memory with which a step's drive time is within a quarter of what making the
    model leaves of --row-seconds, and the rest within the free bytes of the drive."""
    if case.options.host_share is not None:
        return float(case.options.host_share)
    whole_s = drive_seconds(case, read_per_numel=14)
    if not whole_s:
        return 0.0
    row_seconds = case.options.row_seconds
    allowed_s = max(row_seconds - case.options.construction_s, row_seconds / 4) / 4
    share = max(0.0, 1 - allowed_s / whole_s)
    free_nbytes = 0.7 * shutil.disk_usage(case.storage).free
    share = max(share, 1 - free_nbytes / ((STATE_NBYTES + 2) * case.numel))
    return min(1.0, round(share + 0.005, 2)) if share > 0 else 0.0


def least_host_nbytes(case: Case, model: nn.Module, settings: dict[str, Any]) -> int:
    """Host memory that holds staging alone: the least that would do, as the refusal of next to nothing says, and a
    second block on its way."""
    second = 6 * max(sum(p.numel() for p in layer.parameters()) for layer in case.family.layers(model))
    try:
        offload.wrap(model, torch.optim.AdamW(model.parameters()), host_memory=4096, **settings)
    except offload.BudgetError as refused:
        found = re.search(r"host_memory='(\d+)'", str(refused))
        if found is None:
            raise
        return int(found[1]) + second
    raise SystemExit("4096 bytes of host memory were enough; that cannot be")


def ours(
    case: Case,
    placement: str,
    *,
    planned: bool,
    compiled: bool,
    may_plan: bool,
    stays: bool,
    all_on_storage: bool,
) -> Run:
    """This library. `may_plan`: also after the first step, as it does by itself. `stays`: whether optimizer state may
    stay in device memory."""
    options = case.options
    facts: dict[str, Any] = {"device_budget_bytes": int(options.device_memory_gb * 1e9)}
    settings: dict[str, Any] = {"storage": [], "prefetch_blocks": options.prefetch_blocks}
    settings["micro_batches"] = max(1, -(-case.batch * options.sequence // case.micro_tokens))
    shape = case.family.shape
    inputs_nbytes = 2 * case.batch * options.sequence * shape.hidden * (shape.layers + 4)
    host_nbytes = int(1.4 * (STATE_NBYTES + 2) * case.numel + inputs_nbytes + 1e9)
    settings |= {
        "device": case.device.name, "device_memory": facts["device_budget_bytes"], "step_aside": "never",
        "chunked_loss": case.family.chunked_loss,
    }  # fmt: skip
    if compiled:
        settings["compile_blocks"] = True
    if not may_plan:
        settings["plan"] = "none"
    if not stays:
        settings["states_on_device"] = 0
    model = case.family.make(recompute=False)
    if placement == "storage":
        share = facts["host_share"] = 0.0 if all_on_storage else host_share_within(case)
        settings["storage"] = [case.storage]
        host_nbytes = least_host_nbytes(case, model, settings) + int(share * STATE_NBYTES * case.numel)
    if planned:
        if case.device.is_cuda is False:
            raise offload.ConfigError("a plan needs the profile of a GPU")
        host_nbytes += inputs_nbytes  # the planner has use for more than the least
        del settings["micro_batches"], settings["prefetch_blocks"]
        settings |= {"batch": (case.batch, options.sequence), "hardware": options.profile}
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-5), host_memory=host_nbytes, **settings
    )
    engine = model.offload
    facts |= {
        "micro_tokens": case.micro_tokens, "micro_batches": engine.micro_batches, "host_budget_bytes": host_nbytes,
        "state_on_storage_bytes": engine.placement.storage_nbytes,
    }  # fmt: skip
    on_cpu = [block for block in [*engine.blocks, engine.root] if not block.on_device]
    facts["updated_on_device"] = case.numel - (
        numel := sum(s.numel for b in on_cpu for s in b.layout.trainable_segments)
    )
    return Run(plain_step(case, model, optimizer, case.batch), engine, True, numel, engine.close, facts)


def deepspeed(case: Case, placement: str) -> Run:
    """ZeRO-3, layers recomputed."""
    nvme_path = case.storage if placement == "deepspeed-nvme" else None
    step, close = gpu_deepspeed.zero3(case.family, case.batch, nvme_path)
    return Run(step, recomputes=True, close=close)


def make_run(case: Case, placement: str) -> Run:
    """The run of that name."""
    where, *how = placement.split("+")
    if where in ("gpu", "gpu-keep"):
        return on_gpu(case, recompute=where == "gpu", compiled="compile" in how)
    if where.startswith("deepspeed"):
        return deepspeed(case, where)
    return ours(
        case, where, planned="plan" in how, compiled="compile" in how, may_plan="noplan" not in how,
        stays="streamed" not in how,
        all_on_storage="all" in how,
    )  # fmt: skip


def timed_steps(run: Run, case: Case, begin_s: float) -> dict[str, Any]:
    """Steady steps: their seconds, and per step the bytes moved, the stalls and what was asked of the driver.
    `begin_s`: when the row's time began to run."""
    tokens = torch.randint(
        0,
        case.family.shape.vocab,
        (case.batch, case.options.sequence),
        generator=torch.Generator().manual_seed(1),
    ).to(case.device.torch_device)
    times: list[float] = []
    stalls: dict[str, float] = {}
    before: dict[str, int] = {}
    asked = memory = case.device.memory()
    loss = torch.tensor(float("nan"))
    while len(times) < WARM_UP_STEPS + case.options.steps:
        n = len(times)
        if n > WARM_UP_STEPS and time.perf_counter() - begin_s + times[-1] > case.options.row_seconds:
            break  # at least one step is measured, however long it takes
        if n == WARM_UP_STEPS:
            before = gpu_common.counted(run.engine) if run.engine else {}
            asked = case.device.memory()
        start = time.perf_counter()
        loss = run.step(tokens)
        case.device.synchronize()
        times.append(time.perf_counter() - start)
        if run.engine and n >= WARM_UP_STEPS:
            for cause, seconds in run.engine.last_step["stall_s"].items():
                stalls[cause] = stalls.get(cause, 0.0) + seconds
    measured = times[WARM_UP_STEPS:]
    memory = case.device.memory()
    moved = {}
    if run.engine and run.engine.plan is not None:  # made before the run, or after its first step
        planned_flops = (
            run.engine.plan.predicted.hardware_flops
        )  # which does not know what the model runs again
        run.facts["planned_hardware_flops"] = planned_flops + case.loss_flops_again
    if run.engine:
        after = gpu_common.counted(run.engine)
        moved = {key: (after[key] - before[key]) / len(measured) for key in after}
        moved["updated"] = float(run.updated)
    return {
        "step_s": common.median(measured),
        "fastest_slowest_s": common.spread(measured),
        "n_steps": len(measured),
        "moved": moved,
        "stall_s": {cause: seconds / len(measured) for cause, seconds in stalls.items()} or None,
        "loss": float(loss),
        "driver_allocations": _since(memory, asked, "driver_allocations"),
        "allocator_retries": _since(memory, asked, "retries"),
        "device_peak_bytes": memory["reserved_peak"],
        "device_peak_allocated_bytes": memory["allocated_peak"],
    }


def _since(now: dict[str, int | None], before: dict[str, int | None], name: str) -> int | None:
    after, first = now[name], before[name]
    return None if after is None or first is None else after - first


def trained(case: Case, placement: str) -> dict[str, Any]:
    """What steps of one placement have shown; `error` where it cannot be run."""
    run = None
    begin_s = time.perf_counter()
    try:
        run = make_run(case, placement)
        run.facts["construction_s"] = time.perf_counter() - begin_s
        timed = timed_steps(run, case, begin_s)
        return {**run.facts, "recomputes": run.recomputes, **timed}
    except gpu_common.FAILURES as error:
        return {**(run.facts if run else {}), "error": gpu_common.failure(error)}
    finally:
        if run is not None:
            with contextlib.suppress(*gpu_common.FAILURES):  # after a failed step it may have more to say
                run.close()


def row_of(case: Case, placement: str) -> dict[str, Any]:
    """One row; with `error` where it cannot be run."""
    tokens_per_step = case.batch * case.options.sequence
    row: dict[str, Any] = {
        "name": case.name(placement),
        "numel": case.numel,
        "tokens_per_step": tokens_per_step,
        "sequence": case.options.sequence,
    }
    for _ in range(TRIES):
        case.device.start_counting()
        done = trained(case, placement)
        decides_itself = placement.startswith("deepspeed") or placement.endswith("+plan")
        if "out of memory" not in done.get("error", "") or decides_itself:
            break
        case = dataclasses.replace(case, micro_tokens=case.micro_tokens // 2, parts=2 * case.parts)
    row |= done
    if "error" in row:
        return row
    model_flops, hardware_flops = case.flops(row.pop("recomputes"))
    hardware_flops = row.get("planned_hardware_flops") or hardware_flops
    row |= {
        "tokens_per_s": tokens_per_step / row["step_s"],
        "model_tflops": model_flops / row["step_s"] / 1e12,
        "hardware_tflops": hardware_flops / row["step_s"] / 1e12,
        "rss_peak_bytes": gpu_common.rss_peak_nbytes(),
    }
    row["rss_gb"] = row["rss_peak_bytes"] / 1e9
    row["device_peak_gb"] = None if row["device_peak_bytes"] is None else row["device_peak_bytes"] / 1e9
    row["budget_gb"] = row["device_budget_bytes"] / 1e9 if "device_budget_bytes" in row else None
    found = gpu_common.floors(case.hardware, case.workload, case.batch, hardware_flops, row["moved"])
    return gpu_common.with_floors(row, found)


def plain_seconds(path: str | None, case: Case) -> dict[str, float]:
    """Seconds of the plain rows of this case in a file of rows, by placement."""
    if not path or not os.path.exists(path):
        return {}
    with open(path) as file:
        found = {row["name"]: row["step_s"] for row in json.load(file)["rows"] if "step_s" in row}
    names = {placement: case.name(placement) for placement in ("gpu", "gpu-keep")}
    return {key.replace("-", "_"): found[name] for key, name in names.items() if name in found}


def placements_of(case: Case, placements: list[str]) -> list[str]:
    """Those that are wanted at this many tokens a step."""
    few = case.batch * case.options.sequence < case.options.storage_from_tokens
    return [placement for placement in placements if not (few and placement.startswith("storage"))]


def rows_of(case: Case, placements: list[str], rows: Rows, clock: Clock) -> None:
    """All placements of one batch size, with the ratios to the plain ones."""
    plain = plain_seconds(case.options.plain_of, case)
    for placement in placements:
        if not clock.next_row(case.options):
            rows.add({"name": case.name(placement), "not_run": "no time was left"}, COLUMNS)
            continue
        least_s, left_s = least_seconds(case, placement), clock.left_s
        if least_s > left_s:
            why = f"it takes {least_s:.0f} s at least, {left_s:.0f} s were left"
            rows.add({"name": case.name(placement), "not_run": why}, COLUMNS)
            continue
        row = row_of(case, placement)
        clock.made(row, case.options)
        if placement.startswith("gpu") and "step_s" in row:
            plain[placement.replace("-", "_")] = row["step_s"]
        elif "step_s" in row:
            row |= {f"of_{name}": seconds / row["step_s"] for name, seconds in plain.items()}
            row |= {f"{name}_step_s": seconds for name, seconds in plain.items()}
            alike = "gpu+compile" if placement.endswith("+compile") else "gpu"
            if alike in plain:
                row = gpu_common.with_best(row, plain[alike])
        rows.add(row, COLUMNS)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda", help="cuda, cuda:N or emulated")
    made.add_argument(
        "--tiny", action="store_true", help="seconds without a GPU: to see that the script runs"
    )
    made.add_argument("--model", choices=sorted(SHAPES), default="1b")
    made.add_argument("--family", choices=sorted(FAMILIES), default="plain")
    made.add_argument("--vocab", type=int, help="default: 32000; Llama 3.2 has 128256")
    made.add_argument("--sequence", type=int, default=1024, help="tokens of a sequence")
    made.add_argument("--tokens-per-step", default="32768", help="several with commas between")
    made.add_argument("--micro-tokens", type=int, default=8192, help="tokens on the device at once")
    made.add_argument("--placements", default=",".join(PLACEMENTS))
    made.add_argument("--plain-of", help="file with the rows of plain torch, where none is run here")
    made.add_argument("--prefetch-blocks", type=int, default=2)
    made.add_argument("--steps", type=int, default=4, help="measured at most, after two that are not")
    made.add_argument(
        "--row-seconds", type=float, default=40.0, help="no further step after so long, all included"
    )
    made.add_argument(
        "--seconds", type=float, default=3600.0, help="for all rows: each gets its share of what is left"
    )
    made.add_argument("--device-memory-gb", type=float, default=8.0)
    made.add_argument(
        "--storage-from-tokens",
        type=int,
        default=0,
        help="no rows with state on storage below so many a step",
    )
    made.add_argument("--host-share", type=float, help="of the state in the placement storage")
    made.add_argument("--profile", help="of this machine, from gpu_rates.py, for floors and plans")
    made.add_argument("--storage", default=".", help="directory on the drive")
    made.add_argument("--json")
    made.set_defaults(construction_s=0.0)  # of the rows so far, as the clock knows it
    return made


def cases(options: argparse.Namespace, device: Device, storage: str) -> Iterator[Case]:
    """One for each batch size."""
    family = FAMILIES[options.family](options.model, options.vocab)
    workload = profile_model(family.empty(), options.sequence, name=family.name)
    hardware = gpu_common.profile_of(options.profile)
    for tokens_per_step in map(int, options.tokens_per_step.split(",")):
        batch = max(1, tokens_per_step // options.sequence)
        yield Case(family, batch, options, device, hardware, workload, storage, options.micro_tokens)


def main() -> None:
    """Every batch size in every placement."""
    options = parser().parse_args()
    gpu_common.tiny(options, **TINY)
    device = Device(options.device)
    storage = tempfile.mkdtemp(prefix="offload-gpu-", dir=options.storage)
    try:
        rows = Rows(options, "gpu_train", storage, device)
        placements = options.placements.split(",")
        sizes = [(case, placements_of(case, placements)) for case in cases(options, device, storage)]
        clock = Clock(options, sum(len(wanted) for _, wanted in sizes), gpu_common.process_age_s())
        for case, wanted in sizes:
            rows_of(case, wanted, rows, clock)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    main()

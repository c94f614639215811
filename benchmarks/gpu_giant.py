"""A few layers of a giant, in its exact shapes, through the whole path within a small device budget.

    gpt3-175b    2 layers of 1.81 B parameters (hidden 12288), of 96
    llama-70b    4 layers of 0.86 B parameters (hidden 8192), of 80

A plan with fixed choices (updates in backward, everything recomputed) is run and simulated: measured seconds a layer of
forward, backward with recomputation, and update (from its first chunk to its last), medians over the layers and steps,
stand beside the simulator's for the same plan with the profile that gpu_rates.py measured on this machine, once with
the rate of matrix products and once with the rates of this model's own layers, timed alone (a row of its own, made
first; --rates-of takes them from there). From these rates follows the figure for the whole model, with as many of this
machine's drives as --drives says: simulated, as the row says. With --in-host below 1, part of the layers is on storage.

    python benchmarks/gpu_giant.py --model gpt3-175b --profile FILE --drives '' --json FILE
    python benchmarks/gpu_giant.py --model gpt3-175b --rates-of FILE --drives '' --in-host 0.5 --steps 1 --warm-up 1
    python benchmarks/gpu_giant.py --model gpt3-175b --device emulated --whole-of FILE     # later, anywhere
    python benchmarks/gpu_giant.py --device emulated --tiny --storage DIR
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import common
import gpu_common
import torch
from gpu_common import Device, Rows
from torch import nn

import offload
from offload.config import Config
from offload.errors import BudgetError
from offload.model.presets import Decoder, shape_of
from offload.planner.hardware import Hardware, load_hardware
from offload.planner.plan import Budgets, Plan
from offload.planner.workload import Workload
from offload.profiling.block_probe import BlockProbe
from offload.profiling.workload import profile_model
from offload.schedule.fastest import make_simulated_plan
from offload.schedule.run import SimulatedStep, simulate_plan
from offload.telemetry import Span
from offload.tiers.device import CUDA_OWN_NBYTES
from offload.transfer.io_engine import UpdatePipeline

COLUMNS = (
    "step_s", "predicted_step_s", "forward_s", "predicted_forward_s", "backward_s", "predicted_backward_s", "update_s",
    "predicted_update_s", "of_floor", "largest_floor", "device_peak_gb", "budget_gb", "stall_s",
)  # fmt: skip
WHOLE_COLUMNS = (
    "drives",
    "step_s",
    "tokens_per_s",
    "hardware_tflops",
    "device_peak_gb",
    "host_peak_gb",
    "bytes_on_drives_gb",
)
RATES_COLUMNS = ("work_tflops",)
LAYERS = {"gpt3-175b": 2, "llama-70b": 4}
VOCAB = 1024
CLOSING_S = 8.0
"""What giving back page-locked memory and simulating the plan take."""
KINDS = {"forward": ("forward",), "backward": ("recompute", "backward"), "update": ("update",)}


def layer_seconds(spans: Sequence[Span]) -> dict[str, float]:
    """Median seconds of a layer's forward, backward (with recomputation) and update in measured or simulated spans.

    Spans are named `KIND LAYER` (simulated ones may go on, as in `forward 3.0`). Compute counts by the time inside
    spans, an update from its first chunk's start to its last one's end, because its chunks run side by side.
    """
    inside: dict[tuple[str, str], float] = defaultdict(float)
    ends: dict[tuple[str, str], list[float]] = {}
    for span in spans:
        kind, _, label = span.name.partition(" ")
        layer = label.split(".")[0].split(" ")[0]
        if not layer.isdigit():
            continue
        for wanted, kinds in KINDS.items():
            if kind in kinds and span.resource == ("cpu" if wanted == "update" else "compute"):
                inside[wanted, layer] += span.end_s - span.start_s
                first = ends.setdefault((wanted, layer), [span.start_s, span.end_s])
                first[0], first[1] = min(first[0], span.start_s), max(first[1], span.end_s)
    found: dict[str, float] = {}
    for wanted in KINDS:
        layers = [layer for kind, layer in inside if kind == wanted]
        if layers:
            found[wanted] = common.median(
                [
                    ends[wanted, n][1] - ends[wanted, n][0] if wanted == "update" else inside[wanted, n]
                    for n in layers
                ]
            )
    return found


def of_this_step(spans: Sequence[Span]) -> list[Span]:
    """Simulated `spans` without the updates that the step before has left: with updates made in backward, those that
    start before its first backward does. A record of a run begins with a flush and holds none."""
    first_s = min((s.start_s for s in spans if s.name.startswith("backward")), default=0.0)
    return [s for s in spans if not s.name.startswith("update ") or s.start_s >= first_s]


def own_rates(
    hardware: Hardware,
    model: nn.Module,
    workload: Workload,
    samples: int,
    tokens: torch.Tensor,
    device: Device,
) -> Hardware:
    """`hardware` with the rates of this model's own layers on the device, where nothing is moved beside them."""
    probe = BlockProbe(
        model, workload, samples, lambda net: net(tokens[:samples]), settle=device.synchronize,
    )  # fmt: skip
    probe.step_seconds()
    seconds = [probe.step_seconds() for _ in range(2)]
    rates = probe.flops_per_s({work: common.median([s[work] for s in seconds]) for work in seconds[0]})
    return hardware.model_copy(update={"work_flops_per_s": rates, "launch_overhead_s": 0.0})


def fixed_plan(
    workload: Workload, hardware: Hardware, options: argparse.Namespace, staging_nbytes: int, in_host: float
) -> Plan:
    """Updates in backward, everything recomputed, state in host memory as far as `in_host` says; none stays on the
    device, where next to nothing of a whole giant's could."""
    fixed = {
        "update": "backward", "activations": "recompute", "micro_batches": options.batch // options.micro_batch,
        "prefetch_blocks": 1, "grad_buffers": 1, "params_host_fraction": in_host, "states_host_fraction": in_host,
        "boundary_on_device": True, "inputs": "device", "states_on_device": 0,
    }  # fmt: skip
    budgets = Budgets(
        int(options.device_memory_gb * 1e9), int(options.host_memory_gb * 1e9),
        storage_nbytes=None if in_host < 1 else 0, staging_nbytes=staging_nbytes,
        device_own_nbytes=CUDA_OWN_NBYTES if options.device.startswith("cuda") else 0,
    )  # fmt: skip
    plan = make_simulated_plan(workload, hardware, budgets, fixed, batch_samples=options.batch)
    return plan.model_copy(update={"chunk_elements": Config().chunk_elements})


def left_s(options: argparse.Namespace) -> float:
    """Of --seconds, without what the end takes."""
    return options.seconds - CLOSING_S - gpu_common.process_age_s()


def steps_in_time(
    step: Callable[[], float], n_steps: int, n_after: int, left_s: Callable[[], float]
) -> list[float]:
    """Seconds of so many steps; of at least one, where there is no time for one more and the `n_after` that follow."""
    seconds = [step()]
    while len(seconds) < n_steps and (n_after + 1) * seconds[-1] < left_s():
        seconds.append(step())
    return seconds


def measured(
    model: nn.Module,
    plan: Plan,
    tokens: torch.Tensor,
    options: argparse.Namespace,
    device: Device,
    storage: str,
) -> dict[str, Any]:
    """Steady steps of the plan: seconds a step and a layer, bytes, peaks."""
    numel = sum(p.numel() for p in model.parameters())
    model, optimizer = offload.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-5),
        device=device.name,
        device_memory=int(options.device_memory_gb * 1e9),
        host_memory=int(options.host_memory_gb * 1e9),
        storage=[] if options.in_host >= 1 else [storage],
        step_aside="never",
        plan=plan.to_json(),
    )
    engine = model.offload

    def step() -> float:
        start = time.perf_counter()
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        device.synchronize()
        return time.perf_counter() - start

    try:
        if options.warm_up:
            steps_in_time(step, options.warm_up, 2, lambda: left_s(options))
        before = gpu_common.counted(engine)
        times = steps_in_time(step, options.steps, 1, lambda: left_s(options))  # and the recorded one
        after = gpu_common.counted(engine)
        stalls = dict(engine.last_step["stall_s"])
        with engine.record() as spans:
            step()
        moved = {key: (after[key] - before[key]) / len(times) for key in after}
        memory = device.memory()
        return {
            "step_s": common.median(times),
            "n_steps": len(times),
            "numel": numel,
            "state_on_storage_bytes": engine.placement.storage_nbytes,
            "layers_s": layer_seconds(spans),
            "moved": {**moved, "updated": float(numel)},
            "stall_s": stalls,
            "device_peak_bytes": memory["reserved_peak"],
            "allocator_retries": memory["retries"],
        }
    finally:
        engine.close()


def rates_for(device: Device, path: str) -> Hardware:
    """The profile at `path`. The emulated device has memory of its own and a bus like DRAM, whatever a profile of a
    machine without a GPU says: a plan for memory that is shared would leave it no slot."""
    hardware = load_hardware(path)
    if device.is_cuda or not hardware.shares_host:
        return hardware
    ways = ("h2d", "d2h", "h2d_duplex", "d2h_duplex")
    bus = dict.fromkeys((f"{way}_bytes_per_s" for way in ways), hardware.dram_bytes_per_s)
    return hardware.model_copy(update={"shares_host": False, **bus})


def rates_in(path: str) -> Hardware:
    """The profile with the model's own rates in the rows of a file."""
    with open(path) as file:
        found = [row["hardware"] for row in json.load(file)["rows"] if "hardware" in row]
    if not found:
        raise SystemExit(f"{path} has no row with the rates of a model's own layers")
    return Hardware.model_validate(found[0])


def whole_model(name: str, hardware: Hardware, options: argparse.Namespace, n_drives: int) -> dict[str, Any]:
    """The simulator's figure for all layers on this machine with so many of its drives, as large as they need to be."""
    empty = gpu_common.on_meta(lambda: Decoder(shape_of(name)), torch.bfloat16)
    workload = profile_model(empty, options.sequence, name=name)
    drive = hardware.drives[0].model_copy(update={"capacity_nbytes": None})
    more = {
        "drives": (drive,) * n_drives,
        "storage_read_bytes_per_s": None,
        "storage_write_bytes_per_s": None,
    }
    machine = hardware.model_copy(update={**more, "storage_mixed_bytes_per_s": None})
    budgets = Budgets(
        int(options.device_memory_gb * 1e9),
        int(options.host_memory_gb * 1e9),
        device_own_nbytes=CUDA_OWN_NBYTES,
    )
    row: dict[str, Any] = {"name": f"gpu_giant_{name}_whole_simulated_{n_drives}_drives", "drives": n_drives}
    try:
        plan = make_simulated_plan(workload, machine, budgets, batch_samples=options.whole_batch)
    except BudgetError as error:
        return {**row, "error": gpu_common.failure(error)}
    step = simulate_plan(plan, workload, machine)
    return {
        **row,
        "step_s": step.step_s,
        "tokens_per_s": step.tokens_per_s,
        "tokens_per_step": options.whole_batch * options.sequence,
        "hardware_tflops": step.hardware_tflops,
        "device_peak_gb": step.peak_nbytes["device"] / 1e9,
        "host_peak_gb": step.peak_nbytes["host"] / 1e9,
        "bytes_on_drives_gb": step.peak_nbytes["storage"] / 1e9,
        "stall_s": step.stall_s,
    }


def predictions(prefix: str, step: SimulatedStep) -> dict[str, float]:
    """A simulated step's seconds, whole and by layer."""
    layers = layer_seconds(of_this_step(step.spans))
    return {f"{prefix}step_s": step.step_s, **{f"{prefix}{kind}_s": s for kind, s in layers.items()}}


def why_not_run(
    workload: Workload,
    plan: Plan,
    predicted: SimulatedStep,
    options: argparse.Namespace,
    storage: str,
) -> str | None:
    """Where part of the state is on storage: why there is no room or time for it, or None."""
    numel = sum(b.trainable_numel for b in workload.blocks) + workload.root_trainable_numel
    nbytes = (1 - options.in_host) * plan.state_format.stored_nbytes * numel
    free_nbytes = shutil.disk_usage(storage).free
    if nbytes > 0.7 * free_nbytes:
        return f"{nbytes / 1e9:.0f} GB do not fit in 0.7 of the {free_nbytes / 1e9:.0f} GB that are free on the drive"
    n_steps = options.warm_up + options.steps + 2  # the recorded one, and the first state's way to the drive
    left = max(0.0, left_s(options))
    if nbytes > 0 and n_steps * predicted.step_s > left:
        return f"{n_steps} times {predicted.step_s:.1f} s a step are predicted, {left:.0f} s are left"
    return None


def slice_rows(
    options: argparse.Namespace, device: Device, hardware: Hardware, storage: str, rows: Rows
) -> Hardware:
    """Add the row of the layers' own rates, then that of the slice; returns the profile with these rates."""
    whole = shape_of(options.model)
    sizes: dict[str, Any] = {"layers": options.layers, "vocab": VOCAB}
    if options.hidden:
        heads = options.hidden // 16
        sizes |= {
            "hidden": options.hidden,
            "heads": heads,
            "intermediate": 4 * options.hidden,
            "key_value_heads": heads,
        }
    shape = gpu_common.replaced(whole, **sizes)
    workload = profile_model(
        gpu_common.on_meta(lambda: Decoder(shape), torch.bfloat16), options.sequence, name=options.model
    )
    tokens = torch.randint(0, VOCAB, (options.batch, options.sequence)).to(device.torch_device)
    part = "" if options.in_host >= 1 else f"_{options.in_host:g}_in_host"
    row: dict[str, Any] = {
        "name": f"gpu_giant_{options.model}_{options.layers}_layers{part}", "tokens_per_step": tokens.numel(),
        "in_host": options.in_host, "numel_per_layer": workload.blocks[0].trainable_numel,
    }  # fmt: skip
    device.start_counting()
    model = gpu_common.with_random_weights(lambda: Decoder(shape), torch.bfloat16)
    if options.rates_of:
        hardware = rates_in(options.rates_of)
    elif not options.no_own_rates:
        model = model.to(device.torch_device)
        hardware = own_rates(hardware, model, workload, options.micro_batch, tokens, device)
        model = model.to("cpu")
        device.start_counting()
        tflops = {work: rate / 1e12 for work, rate in hardware.work_flops_per_s.items()}
        measured_rates = {"work_tflops": tflops, "hardware": hardware.model_dump(mode="json")}
        rows.add({"name": f"gpu_giant_{options.model}_own_rates", **measured_rates}, RATES_COLUMNS)
    settings = Config().beside(device.torch_device.type)
    staging = UpdatePipeline.buffer_nbytes_required(settings.chunk_elements, settings.chunk_buffers)
    plan = fixed_plan(workload, hardware, options, staging, options.in_host)
    predicted = simulate_plan(plan, workload, hardware, staging_nbytes=staging)
    why = why_not_run(workload, plan, predicted, options, storage)
    if why:
        rows.add({**row, "not_run": why}, COLUMNS)
        return hardware
    row |= measured(model, plan, tokens, options, device, storage)
    row |= {f"{kind}_s": seconds for kind, seconds in row.pop("layers_s").items()}
    row |= predictions("predicted_", predicted)
    by_products = hardware.model_copy(update={"work_flops_per_s": {}})
    row |= predictions(
        "predicted_by_products_", simulate_plan(plan, workload, by_products, staging_nbytes=staging)
    )
    row["hardware"] = hardware.model_dump(mode="json")
    peak = row["device_peak_bytes"]
    row |= {
        "device_peak_gb": None if peak is None else peak / 1e9, "budget_gb": options.device_memory_gb,
        "hardware_tflops": 4 * options.batch * sum(b.flops_per_sample for b in workload.blocks) / row["step_s"] / 1e12,
    }  # fmt: skip
    flops = (
        4
        * options.batch
        * (sum(b.flops_per_sample for b in workload.blocks) + workload.root_flops_per_sample)
    )
    floors = gpu_common.floors(hardware, workload, options.batch, flops, row["moved"])
    rows.add(gpu_common.with_floors(row, floors), COLUMNS)
    return hardware


def main() -> None:
    """The slice, then the whole by simulation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", choices=sorted(LAYERS), default="gpt3-175b")
    parser.add_argument("--layers", type=int, help="default: 2 of gpt3-175b, 4 of llama-70b")
    parser.add_argument("--hidden", type=int, default=0, help="another width, for trying the script")
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step of the slice")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences on the device at once")
    parser.add_argument("--whole-batch", type=int, default=64, help="sequences a step of the whole model")
    parser.add_argument(
        "--drives", default="1,12", help="numbers of this machine's drives for the whole model's rows"
    )
    parser.add_argument("--whole", help="the whole model, where it is another than the slice's")
    parser.add_argument(
        "--whole-of", help="no slice: the whole model's rows from the rates in this file of its rows"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device-memory-gb", type=float, default=24.0)
    parser.add_argument("--host-memory-gb", type=float, default=100.0)
    parser.add_argument(
        "--in-host", type=float, default=1.0, help="share of parameters and states in host memory"
    )
    parser.add_argument("--no-own-rates", action="store_true", help="do not time the layers alone first")
    parser.add_argument("--rates-of", help="the layers' own rates from this file of rows, not timed again")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not measured")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="no run with state on storage that would take longer"
    )
    parser.add_argument("--profile", default="h100", help="of this machine, from gpu_rates.py")
    parser.add_argument("--storage", default=".")
    parser.add_argument("--json")
    options = parser.parse_args()
    gpu_common.tiny(
        options, hidden=64, layers=3, sequence=32, batch=4, micro_batch=2, steps=1, device_memory_gb=0.05,
        host_memory_gb=0.2, whole_batch=8,
    )  # fmt: skip
    options.layers = options.layers or LAYERS[options.model]
    device = Device(options.device)
    if device.is_cuda and not options.whole_of and not os.path.exists(options.profile):
        print(
            f"rates of {options.profile!r}, which is not a profile of this machine: run the stage `rates` first"
        )
    storage = tempfile.mkdtemp(prefix="offload-gpu-", dir=options.storage)
    try:
        rows = Rows(options, "gpu_giant", storage, device)
        if options.whole_of:
            hardware = rates_in(options.whole_of)
            options.device_memory_gb = max(options.device_memory_gb, 24.0)
            options.host_memory_gb = max(options.host_memory_gb, 16.0)
        else:
            try:
                hardware = slice_rows(options, device, rates_for(device, options.profile), storage, rows)
            except gpu_common.FAILURES as error:
                rows.add({"name": f"gpu_giant_{options.model}", "error": gpu_common.failure(error)}, COLUMNS)
                return
        for n_drives in map(int, filter(None, options.drives.split(","))):
            rows.add(whole_model(options.whole or options.model, hardware, options, n_drives), WHOLE_COLUMNS)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    main()

"""Does swapping activations pay where it should? The planner's choice against recomputing all and swapping all.

The device tier is emulated: DRAM behind a bus that is throttled in the transfer layer (`device="emulated",
bus_bytes_per_s=...`; off unless asked for). The planner gets a profile whose matrix, AdamW and DRAM rates are
measured in this run at the model's shapes, and the bus as it is configured: unless said otherwise, the speed at which
the cost model expects the same of both extremes. Device memory has room for what computes and the blocks' inputs, not
for what backward needs besides. Three engines hold the same model side by side and take their steps in turn; all
run the same micro-batches, so their losses and parameters have to be equal bit for bit.

    python benchmarks/activation_swapping.py --json FILE
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other core copies and updates

import common
import torch
from llama_shaped import LlamaShaped, Shape

import offload
from offload.planner.hardware import Hardware
from offload.planner.memory import Shape as MemoryShape
from offload.planner.memory import device_need
from offload.planner.plan import INPUT, Budgets, Plan, state_format_of
from offload.planner.search import make_plan
from offload.planner.workload import Workload
from offload.profiling import compute_probe
from offload.profiling.block_probe import BlockProbe, Measured, measure
from offload.profiling.compute_probe import UpdateLoop
from offload.profiling.workload import profile_model
from offload.schedule.run import simulate_plan
from offload.transfer.io_engine import UpdatePipeline

POLICIES: dict[str, dict[str, Any]] = {
    "recompute_all": {"activations": "recompute"},
    "swap_all": {"activations": "save", "activations_on_device": False},
    "planned": {},
}
CHUNK_ELEMENTS, CHUNK_BUFFERS = 1 << 18, 4
STAGING_NBYTES = UpdatePipeline.buffer_nbytes_required(CHUNK_ELEMENTS, CHUNK_BUFFERS)


def build(options: argparse.Namespace) -> LlamaShaped:
    """The same initial weights every time, in fp32: a CPU's element-wise operations are slow in bf16."""
    torch.manual_seed(0)
    hidden = options.hidden
    return LlamaShaped(Shape(hidden, options.layers, 4 * hidden, hidden // 64, 512))


def look_of(workload: Workload, options: argparse.Namespace) -> Callable[[], Measured]:
    """Measures this machine with one compute thread, at the model's own work on a micro-batch."""
    samples = options.batch // options.micro_batches
    ids = torch.randint(0, 512, (samples, options.tokens), generator=torch.Generator().manual_seed(1))
    probe, updates = BlockProbe(build(options), workload, samples, lambda model: model(ids)), UpdateLoop()
    return lambda: measure(probe, updates, None)


def machine_of(found: Measured, options: argparse.Namespace) -> Hardware:
    """This machine; the bus as configured."""
    hidden = options.hidden
    rows = options.batch // options.micro_batches * options.tokens
    shapes = ((hidden, hidden),) * 4 + ((hidden, 4 * hidden),) * 2 + ((4 * hidden, hidden),)
    rate = compute_probe.matmul_flops_per_s(shapes, rows, torch.float32, torch.device("cpu"), options.probe_s)
    return Hardware(
        name="this machine behind a throttled bus",
        source="measured in this run; bus as configured",
        shares_host=False,
        device_memory_nbytes=options.device_memory,
        host_memory_nbytes=options.host_memory,
        matmul_flops_per_s={"float32": rate},
        h2d_bytes_per_s=options.bus_bytes_per_s or 1e9,
        d2h_bytes_per_s=options.bus_bytes_per_s or 1e9,
        dram_bytes_per_s=compute_probe.dram_bytes_per_s(options.probe_s / 4),
        launch_overhead_s=0.0,  # it is in the rates
        **asdict(found),
    )


def plan_of(policy: str, workload: Workload, machine: Hardware, options: argparse.Namespace) -> Plan:
    """The fastest plan under `policy`; all state in host memory, the same micro-batches for all."""
    budgets = Budgets(
        device_memory_nbytes=options.device_memory,
        host_memory_nbytes=options.host_memory,
        storage_nbytes=0,
        staging_nbytes=STAGING_NBYTES,
    )
    fixed = {
        "micro_batches": options.micro_batches, "boundary_on_device": True, "update": "backward",
        "activations_host_fraction": 1.0, **POLICIES[policy],
    }  # fmt: skip
    return make_plan(workload, machine, budgets, fixed, batch_samples=options.batch)


@dataclass
class Side:
    """One engine with its plan, and the steps it has made."""

    name: str
    plan: Plan
    model: Any
    optimizer: Any
    step_s: list[float]
    losses: list[float]
    stall_s: list[dict[str, float]]
    predicted_s: list[float]

    def turn(self, tokens: torch.Tensor, n_steps: int) -> None:
        """Steps one after the other; what the last has in flight is waited for. The first is not counted: nothing was
        left in flight before it."""
        self.step(tokens, keep=False)
        for _ in range(n_steps):
            self.step(tokens, keep=True)
        self.model.offload.flush()

    def step(self, tokens: torch.Tensor, keep: bool) -> None:
        """One step; its last updates go on in the next."""
        start_s = time.perf_counter()
        loss = self.model(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start_s
        self.losses.append(float(loss.detach()))
        if keep:
            self.step_s.append(seconds)
            self.stall_s.append(self.model.offload.last_step["stall_s"])


def make_side(name: str, plan: Plan, options: argparse.Namespace) -> Side:
    """Wrap a fresh model with the plan."""
    model = build(options)
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), device="emulated",
        bus_bytes_per_s=options.bus_bytes_per_s, device_memory=options.device_memory, host_memory=options.host_memory,
        chunk_elements=CHUNK_ELEMENTS, chunk_buffers=CHUNK_BUFFERS, update_threads=1, step_aside="never",
        plan=plan.to_json(),
    )  # fmt: skip
    return Side(name, plan, model, optimizer, [], [], [], [])


def device_memory_nbytes(workload: Workload, options: argparse.Namespace) -> int:
    """Three slots, two gradient buffers, what computes, what is in transfer, and the inputs of all blocks."""
    shape = MemoryShape(options.micro_batches, 3, 2, True)
    need = device_need(workload, state_format_of(workload), options.batch, shape)
    return need.total + options.batch * sum(block.input_nbytes_per_sample for block in workload.blocks)


def even_bus_bytes_per_s(workload: Workload, machine: Hardware, options: argparse.Namespace) -> float:
    """The bus at which recomputing all and swapping all are expected to take equally long, by bisection."""

    def swapping_is_slower(bus: float) -> bool:
        plans = [plan_of(p, workload, behind(machine, bus), options) for p in ("recompute_all", "swap_all")]
        recompute, swap = (plan.predicted.step_s for plan in plans if plan.predicted)
        return swap > recompute

    low, high = 1e6, 1e11
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if swapping_is_slower(middle) else (low, middle)
    return round(high, -6)


def behind(machine: Hardware, bus: float) -> Hardware:
    """The machine with another bus."""
    return machine.model_copy(update={"h2d_bytes_per_s": bus, "d2h_bytes_per_s": bus})


def outcome_bytes(plan: Plan, workload: Workload) -> dict[str, float]:
    """Bytes of the saved tensors of a step by what becomes of them."""
    found: dict[str, float] = {"device": 0, "host": 0, "storage": 0, "recompute": 0}
    for block, outcomes in zip(workload.blocks, plan.activations, strict=True):
        for tensor in block.saved:
            found[outcomes[tensor.name]] += plan.batch_samples * tensor.nbytes_per_sample
    return found


def row_of(side: Side, workload: Workload, reference: Side) -> dict[str, Any]:
    """The side's figures, its contents checked against `reference`."""
    mine = {n: t.clone() for block in side.model.offload.iter_blocks() for n, t in block}
    theirs = {n: t.clone() for block in reference.model.offload.iter_blocks() for n, t in block}
    if side.losses != reference.losses or any(not torch.equal(mine[n], theirs[n]) for n in theirs):
        raise SystemExit(f"{side.name} does not give the numbers of {reference.name}")
    predicted = side.plan.predicted
    if predicted is None:
        raise SystemExit("a plan without prediction")
    measured_s = statistics.median(side.step_s)
    predicted_s = statistics.median(side.predicted_s)
    causes = sorted({cause for stalls in side.stall_s for cause in stalls})
    moved = side.model.offload.activations.nbytes_by_tier
    steps = len(side.losses)
    return {
        "name": side.name,
        "step_s": measured_s,
        "step_s_spread": [min(side.step_s), max(side.step_s)],
        "planner_step_s": predicted.step_s,
        "predicted_step_s": predicted_s,
        "predicted_over_measured": predicted_s / measured_s,
        "predicted_forward_seconds": predicted.forward_seconds,
        "predicted_backward_seconds": predicted.backward_seconds,
        "stall_s": {c: statistics.median([s.get(c, 0.0) for s in side.stall_s]) for c in causes},
        "planned_bytes": outcome_bytes(side.plan, workload),
        "swapped_bytes_per_step": moved["host"] / (steps - 1),
        "inputs_in": side.plan.activations[0][INPUT],
        "n_slots": side.plan.n_slots,
        "n_grad_buffers": side.plan.n_grad_buffers,
        "loss": side.losses[-1],
        "same_bits": True,
    }


def show_plans(workload: Workload, machine: Hardware, options: argparse.Namespace) -> None:
    """What the cost model expects over bus speeds; nothing runs. To find a bus at which neither extreme is best."""
    for bus in (5e7, 1e8, 2e8, 3e8, 4e8, 6e8, 8e8, 1.2e9, 2e9):
        plans = {p: plan_of(p, workload, behind(machine, bus), options) for p in POLICIES}
        text = ", ".join(f"{p} {plan.predicted.step_s:.3f} s" for p, plan in plans.items() if plan.predicted)
        share = outcome_bytes(plans["planned"], workload)
        print(f"{bus / 1e6:6.0f} MB/s: {text}; { ({k: round(v / 1e6) for k, v in share.items()}) } MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--bus-bytes-per-s", type=float)
    parser.add_argument("--device-memory", type=int)
    parser.add_argument("--host-memory", type=int, default=2_000_000_000)
    parser.add_argument("--probe-s", type=float, default=4.0, help="seconds that measuring the machine takes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps a side takes in one round that are timed")
    parser.add_argument(
        "--plans", action="store_true", help="print what is expected over bus speeds, and end"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload = profile_model(build(options), options.tokens)
    options.device_memory = options.device_memory or device_memory_nbytes(workload, options)
    look = look_of(workload, options)
    machine = machine_of(look(), options)
    print(f"matrix products {machine.matmul_flops_per_s['float32'] / 1e9:.0f} GFLOP/s")
    if options.plans:
        show_plans(workload, machine, options)
        return
    bus = options.bus_bytes_per_s = options.bus_bytes_per_s or even_bus_bytes_per_s(
        workload, machine, options
    )
    machine = behind(machine, bus)
    print(f"bus {bus / 1e6:.0f} MB/s, device memory {options.device_memory / 1e6:.0f} MB")
    sides = [make_side(p, plan_of(p, workload, machine, options), options) for p in POLICIES]
    tokens = torch.randint(
        0, 512, (options.batch, options.tokens), generator=torch.Generator().manual_seed(1)
    )
    for side in sides:  # the first step writes the recipes
        side.step(tokens, keep=False)
    for number in range(options.rounds):
        now = machine.model_copy(update=asdict(look()))  # rates and steps of the same minute
        for side in sides[number % 3 :] + sides[: number % 3]:
            side.turn(tokens, options.steps)
            step = simulate_plan(side.plan, workload, now, staging_nbytes=STAGING_NBYTES)
            side.predicted_s.append(step.step_s)
    rows = [row_of(side, workload, sides[0]) for side in sides]
    for row in rows:
        row["planned_over_this"] = rows[-1]["step_s"] / row["step_s"]
        row["bus_bytes_per_s"] = options.bus_bytes_per_s
    for side in sides:
        side.model.offload.close()
    about = common.about(".", settings=vars(options), profile=machine.model_dump(mode="json"))
    common.write_rows(
        options.json, [row | about for row in rows], common.command_line(sys.argv[0], sys.argv[1:])
    )


if __name__ == "__main__":
    main()

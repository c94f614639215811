"""Is a planned step ever slower than one placed by budget alone? Both within the same budgets, in turn.

    python benchmarks/planned_or_not.py --storage DIR --json benchmarks/results/planned_or_not.json

For each row of budgets one model runs twice, side by side on this machine's CPU: with `batch=`, planned for rates that
are measured in the run, and with `plan="none"`. The sides take turns of a few steps; the first step of a turn is not
counted, because nothing was left in flight before it. The planner counts what computing needs in device_memory, which
placement by budget does not: the planned side never holds more. Both must give the same losses, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from common import ROOT, about, command_line, median, spread, write_rows

sys.path.insert(0, str(ROOT))

import torch
from llama_shaped import LlamaShaped, Shape
from measured_run import staging_nbytes
from simulator_reality import TOKENS, Bench, Machine
from torch import nn

import offload
from offload.planner.hardware import save_hardware

SHAPE = Shape(hidden=768, layers=8, intermediate=3072, heads=12, vocab=8192)
MB = 10**6
NONE = staging_nbytes() + MB
"""Host memory for staging alone."""
ROWS: dict[str, dict[str, Any]] = {
    "all-parameters-fit": {"device_memory": 520 * MB, "host_memory": NONE},
    "few-slots": {"device_memory": 260 * MB, "host_memory": NONE},
    "half-in-host-memory": {"device_memory": 520 * MB, "host_memory": NONE + 450 * MB},
    "clipping": {"device_memory": 520 * MB, "host_memory": NONE + 320 * MB, "max_grad_norm": 0.5},
    "in-host-memory": {"device_memory": 520 * MB, "host_memory": NONE + 1500 * MB},
}


def build() -> nn.Module:
    """88 M parameters in bf16: eight layers of 9.4 M, an untied head."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaShaped(SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass
class Side:
    """One engine and the steps it has made."""

    model: Any
    optimizer: Any
    step_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, ids: torch.Tensor, *, keep: bool) -> None:
        """One training step, timed from the end of the one before."""
        start = time.perf_counter()
        loss = self.model(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        self.losses.append(float(loss.detach()))
        if keep:
            self.step_s.append(seconds)

    def quiesce(self) -> None:
        """Wait for what is in flight; updates that wait for their block's next use go on waiting."""
        engine = self.model.offload
        for block in [*engine.blocks, engine.root]:
            engine._scheduler.wait_resident(block)


def make_side(storage: str, settings: dict[str, Any]) -> Side:
    """Wrap a fresh model."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Side(
        *offload.wrap(model, optimizer, device="cpu", step_aside="never", storage=[storage], **settings)
    )


def row_of(
    name: str, here: Machine, bench: Bench, storage: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Both sides under one row's budgets."""
    profile = os.path.join(storage, "machine.json")
    save_hardware(here.look(bench), profile)
    ids = torch.randint(0, SHAPE.vocab, (options.batch, TOKENS), generator=torch.Generator().manual_seed(1))
    planned = make_side(
        storage,
        {**ROWS[name], "batch": (options.batch, TOKENS), "hardware": profile, "micro_batches": 1},
    )
    unplanned = make_side(storage, {**ROWS[name], "plan": "none"})
    sides = [planned, unplanned]
    for number in range(options.rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            side.step(ids, keep=False)
            for _ in range(options.steps):
                side.step(ids, keep=number > 0)
            side.quiesce()
    if planned.losses != unplanned.losses:
        raise SystemExit(f"{name}: the planned run's losses are not those of the other")
    plan = planned.model.offload.plan
    found = {
        "name": name,
        "step_s": median(planned.step_s),
        "step_s_spread": spread(planned.step_s),
        "unplanned_step_s": median(unplanned.step_s),
        "unplanned_step_s_spread": spread(unplanned.step_s),
        "planned_over_unplanned": median(planned.step_s) / median(unplanned.step_s),
        "predicted_step_s": plan.predicted.step_s,
        "n_slots": plan.n_slots,
        "n_grad_buffers": plan.n_grad_buffers,
        "params_on_device": plan.params_on_device,
        "held_blocks": plan.held_blocks,
        "unplanned_n_slots": unplanned.model.offload.placement.n_slots,
        "unplanned_params_on_device": unplanned.model.offload.placement.params_on_device,
        "same_losses": True,
        **ROWS[name],
    }
    for side in sides:
        side.model.offload.close()
    return found


def main() -> None:
    """Print and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default=os.getcwd())
    parser.add_argument("--json")
    parser.add_argument("--only", help="names of rows, with commas between")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed in each turn")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    storage = tempfile.mkdtemp(prefix="offload-bench-", dir=options.storage)
    rows: list[dict[str, Any]] = []
    here = Machine(storage)
    try:
        bench = Bench("llama", options.batch, 1, build)
        for name in names:
            rows.append(row_of(name, here, bench, storage, options))
            gc.collect()  # a model refers to itself, and holds its arenas
            print(
                f"{name}: {rows[-1]['step_s']:.3f} planned, {rows[-1]['unplanned_step_s']:.3f} not, "
                f"{rows[-1]['predicted_step_s']:.3f} predicted",
                file=sys.stderr,
                flush=True,
            )
        facts = about(storage)
    finally:
        here.close()
        shutil.rmtree(storage, ignore_errors=True)
    worst = {"name": "worst", "planned_over_unplanned": max(row["planned_over_unplanned"] for row in rows)}
    write_rows(options.json, [row | facts for row in [*rows, worst]], command_line(sys.argv[0], sys.argv[1:]))


if __name__ == "__main__":
    main()

"""CPU time of the thread that launches a step: what a device that computes fast would wait for.

A Llama-shaped model so small that its kernels cost little more than their launch, forward and backward of one step,
several micro-batches. Sides, in turn in one process:

    plain        plain torch, layers recomputed (torch.utils.checkpoint), micro-batch after micro-batch
    recompute    this library, everything recomputed
    swap_out     this library, all that backward needs swapped out to host memory: every operation is looked at

CPU seconds of the launching thread alone, kernels included, since a CPU runs them in it; waits, copies and updates are
not in it. Rows: microseconds for each block and micro-batch, and how many times those of `plain`.

    python benchmarks/launch.py --json FILE
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from common import ROOT, about, command_line, median, parser_of_turns, spread, write_rows

sys.path.insert(0, str(ROOT))

import torch
from llama_shaped import LlamaShaped, Shape

import offload

SHAPE = Shape(hidden=64, layers=16, intermediate=128, heads=4, vocab=64)
TOKENS = 16
SIDES = ("plain", "recompute", "swap_out")

Step = Callable[[], None]


def model_of(n_layers: int, *, recompute: bool) -> LlamaShaped:
    """The same weights every time."""
    torch.manual_seed(0)
    shape = Shape(SHAPE.hidden, n_layers, SHAPE.intermediate, SHAPE.heads, SHAPE.vocab)
    return LlamaShaped(shape, recompute=recompute).to(torch.bfloat16)


def plain(batch: torch.Tensor, n_layers: int) -> tuple[Step, Step]:
    """(forward and backward of one step, what ends it) in plain torch."""
    model = model_of(n_layers, recompute=True)

    def step() -> None:
        for sample in batch.split(1):
            (model(sample) / len(batch)).backward()

    return step, lambda: model.zero_grad()


def ours(batch: torch.Tensor, n_layers: int, saved_activations: str) -> tuple[Step, Step]:
    """The same with this library, on a device with memory of its own."""
    model = model_of(n_layers, recompute=False)
    model, optimizer = offload.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-5),
        device="emulated",
        storage=[],
        device_memory="8MB",
        host_memory="1GB",
        step_aside="never",
        micro_batches=len(batch),
        saved_activations=saved_activations,
    )

    def end() -> None:
        optimizer.step()
        optimizer.zero_grad()
        model.offload.flush()

    return lambda: model(batch).backward(), end


def main() -> None:
    """All sides in turn."""
    parser = parser_of_turns(__doc__)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--micro-batches", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = torch.randint(
        0, SHAPE.vocab, (options.micro_batches, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    steps = {"plain": plain(batch, options.layers)}
    steps["recompute"] = ours(batch, options.layers, "recompute")
    steps["swap_out"] = ours(batch, options.layers, "host")
    micros: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds + 2):
        for side in SIDES:
            step, end = steps[side]
            begin_s = time.thread_time()
            step()
            micros[side].append(
                (time.thread_time() - begin_s) * 1e6 / (options.layers * options.micro_batches)
            )
            end()
    facts = about(".", layers=options.layers, micro_batches=options.micro_batches)
    measured = {side: found[2:] for side, found in micros.items()}
    rows: list[dict[str, Any]] = []
    for side in SIDES:
        ratios = [a / b for a, b in zip(measured[side], measured["plain"], strict=True)]
        row = {
            "name": side,
            "us_per_block_and_micro_batch": median(measured[side]),
            "of_plain": median(ratios),
            "of_plain_range": spread(ratios),
        }
        rows.append(row | facts)
    write_rows(options.json, rows, command_line(__file__, sys.argv[1:]))


if __name__ == "__main__":
    main()

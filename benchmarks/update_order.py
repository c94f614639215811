"""A step that the update limits: updates in the order in which gradients come, and those of the last blocks giving way.

Blocks on an emulated device, all state in host memory. A GPU's arithmetic takes no core from the updates, so that
most of a block's time is slept: `--compute-ms` a forward, twice as much backward. In order of arrival the first
blocks are updated last, and forward needs them first: a step takes forward and the updates, one after the other.
Where the gradients of the last blocks have host memory to wait in, their updates give way to others and go on into
forward ([Note: which update goes first] in offload/schedule/unroll.py). The same model and loop, step about.

Floors: the seconds of a step whose gradients are discarded, and those that the update's one thread works. The larger
is what a step cannot beat.

    python benchmarks/update_order.py --json FILE
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from common import ROOT, about, command_line, median, parser_of_turns, spread, write_rows

sys.path.insert(0, str(ROOT))

import torch
from torch import nn

import offload

HIDDEN = 4


class Asleep(torch.autograd.Function):
    """The identity, which takes a device its time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:  # type: ignore[override]
        """`x` after so many seconds; backward takes twice as many."""
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """See `forward`."""
        time.sleep(2 * ctx.seconds)
        return grad, None


class Block(nn.Module):
    """Two products, and a device's time."""

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.up = nn.Linear(width, HIDDEN * width, bias=False)
        self.down = nn.Linear(HIDDEN * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is (rows, width), as is what is returned."""
        return x + self.down(Asleep.apply(self.up(x).relu(), self.seconds))


class Stack(nn.Module):
    """Blocks and a small root."""

    def __init__(self, n_blocks: int, width: int, seconds: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, seconds) for _ in range(n_blocks))
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss; `x` is (rows, width)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x).float().square().mean()


def wrapped(
    options: argparse.Namespace, host_memory: int, update: str = "backward"
) -> tuple[Any, torch.optim.Optimizer]:
    """The model in fp32 within `host_memory` bytes."""
    torch.manual_seed(0)
    model: Any = Stack(options.blocks, options.width, options.compute_ms / 1e3)
    return offload.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-5),
        device="emulated",
        storage=[],
        device_memory=10**9,
        host_memory=host_memory,
        prefetch_blocks=2,
        update=update,
        update_threads=1,
        chunk_elements=1 << 16,
        activations="keep",
        step_aside="never",
        plan="none",
        optimizer_state=options.moments,
    )


def main() -> None:
    """Both forms in turn."""
    parser = parser_of_turns(__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, default=2, help="of the batch")
    parser.add_argument("--compute-ms", type=float, default=10.0, help="that a block's forward sleeps")
    parser.add_argument("--moments", default="8bit", help="encoding them makes the update slow")
    options = parser.parse_args()
    torch.set_num_threads(1)
    block_numel = 2 * HIDDEN * options.width**2
    roomy = wrapped(options, 16 * options.blocks * block_numel * 2)
    placed = roomy[0].offload.placement
    least = placed.host_nbytes - 4 * block_numel * placed.n_held
    without, discarding = wrapped(options, 2 * placed.host_nbytes, update="deferred")
    runs = {"arrival": wrapped(options, least), "giving way": roomy}
    x = torch.randn(options.rows, options.width)
    step_s: dict[str, list[float]] = {form: [] for form in runs}
    update_s: dict[str, list[float]] = {form: [] for form in runs}
    compute_s: list[float] = []
    losses: dict[str, list[float]] = {form: [] for form in runs}
    for number in range(options.rounds + 2):
        for form, (model, optimizer) in runs.items():
            kernels = model.offload.parts.resources.pipeline.stats
            model.offload.flush()
            for number_of_three in range(3):  # the second is steady: the others' rests are in it and after it
                begin_s, worked_s = time.perf_counter(), kernels()["kernel_s"]
                loss = model(x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if number_of_three == 1 and number >= 2:
                    step_s[form].append(time.perf_counter() - begin_s)
                    update_s[form].append(kernels()["kernel_s"] - worked_s)
                losses[form].append(loss.item())
            model.offload.flush()
        begin_s = time.perf_counter()
        without(x).backward()
        if number >= 2:
            compute_s.append(time.perf_counter() - begin_s)
        discarding.zero_grad()
    held = {form: model.offload.placement.n_held for form, (model, _) in runs.items()}
    taken = {form: model.offload.placement.host_nbytes for form, (model, _) in runs.items()}
    for model in (without, *(model for model, _ in runs.values())):
        model.offload.close()
    facts = about(".", blocks=options.blocks, block_numel=block_numel, rows=options.rows)
    floor_s = max(median(compute_s), median(update_s["giving way"]))
    rows: list[dict[str, Any]] = []
    for form in runs:
        ratios = [a / b for a, b in zip(step_s[form], step_s["arrival"], strict=True)]
        row = {
            "name": form.replace(" ", "_"), "n_held": held[form], "host_nbytes": taken[form],
            "step_s": median(step_s[form]),
            "of_arrival": median(ratios), "of_arrival_range": spread(ratios), "compute_s": median(compute_s),
            "update_s": median(update_s[form]), "update_of_compute": median(update_s[form]) / median(compute_s),
            "floor_ratio": median(step_s[form]) / floor_s,
            "same_losses": losses[form] == losses["arrival"],
        }  # fmt: skip
        rows.append(row | facts)
    write_rows(options.json, rows, command_line(__file__, sys.argv[1:]))


if __name__ == "__main__":
    main()

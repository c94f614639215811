"""Backward with one gradient buffer on the device: a block's gradients leave as they come, or all at its end.

Blocks of three large weights in micro-batches, on an emulated device whose bus has a rate of its own and whose memory
has room for one buffer. The same run, step about, in both forms (see [Note: the only buffer] in
offload/runtime/gradients.py). Seconds from the beginning of the last block's backward to the end of the first's, from
the spans of the run; beside them what one block's gradients take over the bus.

    python benchmarks/gradients_leave.py --json FILE
"""

from __future__ import annotations

import sys
from typing import Any

from common import ROOT, about, command_line, median, parser_of_turns, spread, write_rows

sys.path.insert(0, str(ROOT))

import torch
from torch import nn

import offload
from offload.runtime import gradients


class Block(nn.Module):
    """A gated feed-forward: twice up to four times the width, and down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` and the result are (rows, width)."""
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


def backward_s(spans: list[offload.telemetry.Span]) -> float:
    """From the first block's beginning to the last one's end."""
    computed = [s for s in spans if s.name.startswith(("recompute", "backward"))]
    return max(s.end_s for s in computed) - min(s.start_s for s in computed)


def main() -> None:
    """Both forms in turn."""
    parser = parser_of_turns(__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=512, help="of the batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--bus-bytes-per-s", type=float, default=7e8)
    options = parser.parse_args()
    torch.manual_seed(0)
    model: Any = nn.Sequential(*[Block(options.width) for _ in range(6)]).to(torch.bfloat16)
    numel = sum(p.numel() for p in model[0].parameters())
    model, optimizer = offload.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-5),
        device="emulated",
        bus_bytes_per_s=options.bus_bytes_per_s,
        storage=[],
        device_memory=18 * numel,  # two slots and a buffer are 8, half is for what computes
        host_memory=200 * numel,
        micro_batches=options.micro_batches,
        states_on_device=0,
        step_aside="never",
        plan="none",
    )
    if model.offload.placement.n_grad_buffers != 1:
        raise SystemExit("there is room for more than one gradient buffer")
    batch = torch.randn(options.rows, options.width).to(torch.bfloat16)
    forms = {"at-once": sys.maxsize, "as-they-come": gradients.LEAVES_ALONE_NBYTES}
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(options.rounds + 2):
        for form, least_nbytes in forms.items():
            gradients.LEAVES_ALONE_NBYTES = least_nbytes
            with model.offload.record() as spans:
                model(batch).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if number >= 2:
                seconds[form].append(backward_s(list(spans)))
    model.offload.close()
    facts = about(".", numel_per_block=numel, bus_bytes_per_s=options.bus_bytes_per_s)
    rows: list[dict[str, Any]] = []
    for form, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds["at-once"], strict=True)]
        row = {
            "name": form, "backward_s": median(found), "of_at_once": median(ratios),
            "of_at_once_range": spread(ratios), "copy_of_a_block_s": 4 * numel / options.bus_bytes_per_s,
            "micro_batches": options.micro_batches,
        }  # fmt: skip
        rows.append(row | facts)
    write_rows(options.json, rows, command_line(__file__, sys.argv[1:]))


if __name__ == "__main__":
    main()

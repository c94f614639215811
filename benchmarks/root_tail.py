"""The end of a step that nothing hides: the root's gradients leave the device, its update, its parameters go back.

A model whose tied embedding is most of it, on an emulated device whose bus has a rate of its own. The same run, step
about, with the root in one part and in sixteen (see [Note: the root in parts] in offload/runtime/update_jobs.py).
Seconds from the first of the root's gradients to the last of its parameters, from the spans of the run; beside them
what each of the three stages takes alone in the whole form. One after another is their sum, the floor the longest.

    python benchmarks/root_tail.py --json FILE
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

WIDTH = 256


class Tied(nn.Module):
    """An embedding that is the head too, and four small blocks."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """A loss; `tokens` is (batch, tokens) of int64."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return (x @ self.embedding.weight.T).float().square().mean()


def stages(spans: list[offload.telemetry.Span]) -> dict[str, tuple[float, float]]:
    """(first begin, last end) of the root's spans by stage."""
    found = {}
    for stage in ("grad_out", "update", "load"):
        mine = [span for span in spans if span.name == f"{stage} root"]
        found[stage] = min(span.start_s for span in mine), max(span.end_s for span in mine)
    return found


def main() -> None:
    """Both forms in turn."""
    parser = parser_of_turns(__doc__)
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--bus-bytes-per-s", type=float, default=3e9)
    options = parser.parse_args()
    torch.manual_seed(0)
    model: Any = Tied(options.vocab).to(torch.bfloat16)
    numel = model.embedding.weight.numel()
    model, optimizer = offload.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-5),
        device="emulated",
        bus_bytes_per_s=options.bus_bytes_per_s,
        storage=[],
        device_memory=20 * numel + 10**8,
        host_memory=30 * numel + 10**8,
        step_aside="never",
        plan="none",
    )
    tokens = torch.randint(0, options.vocab, (1, 16))
    forms = {"whole": 1, "parts": gradients.ROOT_PARTS}
    tails: dict[str, list[float]] = {form: [] for form in forms}
    alone: dict[str, list[float]] = {stage: [] for stage in ("grad_out", "update", "load")}
    for number in range(options.rounds + 2):
        for form, n_parts in forms.items():
            gradients.ROOT_PARTS = n_parts
            with model.offload.record() as spans:
                model(tokens).backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    model(tokens)
            if number < 2:
                continue
            found = stages(list(spans))
            tails[form].append(found["load"][1] - found["grad_out"][0])
            if form == "whole":
                for stage, (begin, end) in found.items():
                    alone[stage].append(end - begin)
    model.offload.close()
    facts = about(".", numel=numel, bus_bytes_per_s=options.bus_bytes_per_s)
    stage_s = {stage: median(seconds) for stage, seconds in alone.items()}
    rows: list[dict[str, Any]] = []
    for form, n_parts in forms.items():
        ratios = [a / b for a, b in zip(tails[form], tails["whole"], strict=True)]
        row = {
            "name": form, "n_parts": n_parts, "tail_s": median(tails[form]), "of_whole": median(ratios),
            "of_whole_range": spread(ratios), "alone_s": stage_s,
            "of_floor": max(stage_s.values()) / median(tails[form]),
        }  # fmt: skip
        rows.append(row | facts)
    write_rows(options.json, rows, command_line(__file__, sys.argv[1:]))


if __name__ == "__main__":
    main()

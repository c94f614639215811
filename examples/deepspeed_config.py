"""A script written for DeepSpeed, with one line changed: the import.

    python examples/deepspeed_config.py --deepspeed_config examples/deepspeed_config.json

It trains a small decoder on the bytes of a text, with parameters and optimizer states on the drive, saves a checkpoint
half way, goes on from it in a fresh engine, and writes the weights in 16 bit. Some ten seconds on two CPU cores.
"""

import argparse
import json
import logging
import pathlib
import sys

import torch
from torch import nn
from torch.nn import functional

import offload.deepspeed as deepspeed  # was: import deepspeed

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONTEXT = 64


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Bytes in, mean cross entropy of the next byte out."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs) + self.position(torch.arange(inputs.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


class Text(torch.utils.data.Dataset):
    """Overlapping windows of a file's bytes."""

    def __init__(self, path: pathlib.Path) -> None:
        self.data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return (len(self.data) - CONTEXT - 1) // 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data[8 * index : 8 * index + CONTEXT + 1]


def start(args: argparse.Namespace, data: Text):
    """A fresh model in a fresh engine."""
    torch.manual_seed(0)
    model = Decoder()
    return deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=data
    )


def train(engine, loader, n_steps: int) -> list[float]:
    """`n_steps` optimizer steps; the loss of each micro-batch."""
    losses: list[float] = []
    goal = engine.global_steps + n_steps
    while engine.global_steps < goal:
        for batch in loader:
            loss = engine(batch.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            if engine.global_steps == goal:
                break
    return losses


def main() -> None:
    """Train, save, go on, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "README.md")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = deepspeed.add_config_arguments(parser).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    data = Text(args.text)

    engine, _, loader, _ = start(args, data)
    first = train(engine, loader, args.steps // 2)
    engine.save_checkpoint(args.out / "checkpoints", client_state={"micro_batches": len(first)})
    engine.destroy()

    engine, _, loader, _ = start(args, data)
    path, client_state = engine.load_checkpoint(args.out / "checkpoints")
    last = train(engine, loader, args.steps - args.steps // 2)
    engine.save_16bit_model(args.out, "pytorch_model.bin")
    counted = engine.offload.counters()
    engine.destroy()
    print(
        json.dumps(
            {
                "first_loss": first[0],
                "last_loss": sum(last[-8:]) / len(last[-8:]),
                "resumed_from": str(path),
                "micro_batches": client_state["micro_batches"] + len(last),
                "gb_written": round(counted["written_bytes"] / 1e9, 3),
            }
        )
    )


if __name__ == "__main__":
    main()

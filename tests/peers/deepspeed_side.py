"""One training of a tiny Llama-shaped model, as DeepSpeed's users write it; prints its losses as JSON.

Sides: `deepspeed`, `deepspeed-offload-io` (DeepSpeed, swapping through this library's I/O engine) and `offload`.
"""

import argparse
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from deepspeed_configuration import configuration
from llama_shaped import build

BATCH, TOKENS = 2, 64


def configured(options):
    """A test's small sizes: sub-groups, blocks and queues that a tiny model fills."""
    largest = max(p.numel() for p in build("tiny").parameters()) + 4096
    return configuration(
        options.storage,
        batch=BATCH,
        lr=1e-3,
        largest_parameter=largest if options.swap == "both" else None,
        block_size=1 << 18,
        queue_depth=16,
        threads=1,
        sub_group_size=200_000,
        stage3_param_persistence_threshold=0,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["deepspeed", "deepspeed-offload-io", "offload"])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--swap", choices=["optimizer", "both"], default="optimizer")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(ranks, DS_ACCELERATOR="cpu", MASTER_PORT=str(29500 + os.getpid() % 1000))
    if options.side == "offload":
        import offload.deepspeed as deepspeed
    else:
        import deepspeed
    if options.side == "deepspeed-offload-io":
        from offload.deepspeed import use_io_engine

        use_io_engine()
    model = build("tiny", recompute=options.side != "offload")
    numel = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=configured(options)
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(options.steps):
        tokens = torch.randint(0, 512, (BATCH, TOKENS), generator=generator)
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    moved = {}
    if options.side == "deepspeed-offload-io":
        from offload.deepspeed.aio import counters

        moved = counters()
    print(json.dumps({"losses": losses, "moved": moved, "swapped_numel": numel // 2}))


if __name__ == "__main__":
    main()

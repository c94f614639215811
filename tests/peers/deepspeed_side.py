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
from llama_shaped import build

BATCH, TOKENS = 2, 64


def configuration(options):
    nvme = {"device": "nvme", "nvme_path": options.storage, "pin_memory": False}
    model = build("tiny")
    largest = max(p.numel() for p in model.parameters())
    params = {"device": "cpu", "pin_memory": False}
    if options.swap == "both":
        params = {**nvme, "buffer_count": 64, "buffer_size": largest + 4096, "max_in_cpu": 0}
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 200_000,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "offload_param": params,
            "offload_optimizer": {**nvme, "buffer_count": 8},
        },
        "aio": {"block_size": 1 << 18, "queue_depth": 16, "intra_op_parallelism": 1},
    }


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
        model=model, model_parameters=model.parameters(), config=configuration(options)
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

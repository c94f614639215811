"""One side of benchmarks/train_step.py: a process that trains on demand.

A line on stdin is a number of steps to take, or `digest`; a line of JSON answers it. Sides: `ours`, `memory` (plain
torch, everything in memory) and `deepspeed`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import sys
import time

BATCH, TOKENS = 1, 128
DEVICE_MEMORY = {"tiny": "8MB", "151m": "600MB", "1b": "1500MB"}
SAVED_ACTIVATIONS = {"tiny": "recompute", "151m": "device", "1b": "recompute"}
STATE_NBYTES_PER_PARAM = 12


def memory_nbytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


def worker(options: argparse.Namespace) -> None:
    """Train on demand. Whatever libraries print goes to stderr; answers go to the real stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    maker = {"ours": make_ours, "memory": make_memory, "deepspeed": make_deepspeed}[options.side]
    step, finish, counters, baseline_nbytes, model = maker(options)
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    torch.manual_seed(1)
    batch = torch.randint(0, 512, (BATCH, TOKENS))
    loss = float("nan")
    print(json.dumps({"numel": numel}), file=answers)
    for line in sys.stdin:
        if line.strip() == "digest":
            print(json.dumps({"digest": digest(model)}), file=answers)
            continue
        n_steps = int(line)
        before = counters()
        start = time.perf_counter()
        for _ in range(n_steps):
            loss = step(batch)
        finish()
        step_s = (time.perf_counter() - start) / n_steps
        after = counters()
        answer = {
            "step_s": step_s,
            "loss": loss,
            "read_bytes": (after["read_bytes"] - before["read_bytes"]) / n_steps,
            "written_bytes": (after["written_bytes"] - before["written_bytes"]) / n_steps,
            "rss_over_baseline_bytes": memory_nbytes("VmHWM") - baseline_nbytes,
        }
        print(json.dumps(answer), file=answers)


def baseline_nbytes_of() -> int:
    """Resident memory once torch has taken a step of a tiny model: libraries, thread pools, code that is paged in.

    What training a model takes is counted from here, on every side.
    """
    import torch
    from llama_shaped import build

    model = build("tiny")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(BATCH, TOKENS, dtype=torch.int64)).backward()
    optimizer.step()
    return memory_nbytes("VmRSS")


def digest(model) -> str:
    """Of every parameter as it is computed with, in the order of their names."""
    import torch

    found = {}
    for part in model.offload.iter_blocks():
        for name, parameter in part:
            found[name] = hashlib.sha256(parameter.contiguous().view(torch.uint8).numpy()).hexdigest()
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def process_counters() -> dict[str, int]:
    """Bytes this process had the kernel read from and write to drives."""
    fields = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
    return {"read_bytes": int(fields["read_bytes"]), "written_bytes": int(fields["write_bytes"])}


def step_of(model, optimizer):
    """The user's loop."""

    def step(batch):
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def make_ours(options: argparse.Namespace):
    """Training through `offload.wrap`; host memory is staging and `host_share` of the state, or all that is needed."""
    import torch
    from llama_shaped import build

    import offload
    from offload.config import Config
    from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN
    from offload.transfer.io_engine import UpdatePipeline

    baseline_nbytes = baseline_nbytes_of()
    model = build(options.model)
    numel = sum(p.numel() for p in model.parameters())
    defaults = Config()
    staging_nbytes = UpdatePipeline.buffer_nbytes_required(defaults.chunk_elements, defaults.chunk_buffers)
    staging_nbytes += ACTIVATION_STAGING_NBYTES_MIN
    in_dram = options.storage == ""
    share = 1.2 if in_dram else options.host_share
    model, optimizer = offload.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-4),
        device_memory=options.device_memory or DEVICE_MEMORY[options.model],
        host_memory=staging_nbytes + int(share * numel * STATE_NBYTES_PER_PARAM),
        storage=[] if in_dram else [options.storage],
        saved_activations=options.saved_activations or SAVED_ACTIVATIONS[options.model],
    )

    return step_of(model, optimizer), model.offload.flush, model.offload.counters, baseline_nbytes, model


def make_memory(options: argparse.Namespace):
    """The arithmetic alone: plain torch, bf16, fused AdamW, nothing moved and nothing recomputed."""
    import torch
    from llama_shaped import build

    baseline_nbytes = baseline_nbytes_of()
    model = build(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    return step_of(model, optimizer), lambda: None, process_counters, baseline_nbytes, model


def make_deepspeed(options: argparse.Namespace):
    """ZeRO-Infinity on the CPU, the optimizer on NVMe and the parameters there or in DRAM."""
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(29500 + os.getpid() % 1000),
    )
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    import deepspeed
    from llama_shaped import build

    baseline_nbytes = baseline_nbytes_of()
    model = build(options.model, recompute=True)
    largest = max(p.numel() for p in model.parameters())
    parameters = {"device": "cpu"}
    if options.peer_params == "nvme":
        parameters = {
            "device": "nvme",
            "nvme_path": options.storage,
            "buffer_count": 64,
            "buffer_size": largest + 4096,
            "max_in_cpu": 0,
            "pin_memory": False,
        }
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "steps_per_print": 1 << 30,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": options.peer_sub_group_size,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "offload_param": parameters,
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": options.storage,
                "buffer_count": 8,
                "pin_memory": False,
                "pipeline_read": False,
                "pipeline_write": False,
            },
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "intra_op_parallelism": 2},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(batch):
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step, lambda: None, process_counters, baseline_nbytes, engine.module


def main() -> None:
    """Build the side asked for and answer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "memory", "deepspeed"])
    parser.add_argument("--model", choices=sorted(DEVICE_MEMORY), default="151m")
    parser.add_argument(
        "--storage", default="", help="directory for the state; empty: all of it in host memory"
    )
    parser.add_argument("--host-share", type=float, default=0.0, help="of the state, in host memory")
    parser.add_argument(
        "--device-memory", help="default: one that keeps the parameters, where the model is small"
    )
    parser.add_argument(
        "--saved-activations", help="default: device for the small model, recompute for the large"
    )
    parser.add_argument("--peer-params", choices=["nvme", "cpu"], default="nvme")
    parser.add_argument("--peer-sub-group-size", type=int, default=1_000_000_000)
    worker(parser.parse_args())


if __name__ == "__main__":
    main()

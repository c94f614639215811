"""Full fine-tune of a Llama-shaped model on one GPU within a few GB of `device_memory`, against everything on the GPU.

Three rows for each batch size: `gpu` is plain torch with all state on the device (bf16, fused AdamW, recomputation),
`host` streams from host memory, `storage` from the drive. Each has tokens/s, model TFLOPS (6 FLOPs a parameter and
token plus attention), hardware TFLOPS (forward counted twice, for the recomputation), the peak of the allocator's
reserve against the budget, the process's peak memory, and what the launching thread waited for.

    python benchmarks/gpu_train.py --model 1b --batch 8,32 --json FILE
    python benchmarks/gpu_train.py --device emulated --model tiny --tokens 32 --batch 2   # the same path without a GPU
"""

from __future__ import annotations

import argparse
import gc
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from llama_shaped import SHAPES, build

import offload

WARM_UP_STEPS = 2


def flops(name: str, numel: int, batch: int, tokens: int) -> tuple[float, float]:
    """Model and hardware FLOPs of one step: backward is twice forward, recomputation is one more forward."""
    shape = SHAPES[name]
    embedding = shape.vocab * shape.hidden
    forward = 2 * (numel - embedding) * batch * tokens + 2 * shape.layers * batch * tokens**2 * shape.hidden
    return 3.0 * forward, 4.0 * forward


class Device:
    """The few calls in which a CUDA device differs from the emulated one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cuda = name.startswith("cuda")
        self.torch_device = torch.device(name if self.is_cuda else "cpu")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def start_counting(self) -> None:
        """Forget earlier peaks."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_bytes(self) -> int | None:
        """What the allocator reserved at most; None where nothing counts it."""
        return torch.cuda.max_memory_reserved(self.torch_device) if self.is_cuda else None


def make_step(
    placement: str, options: argparse.Namespace, device: Device, batch: int, storage: str
) -> tuple[Callable[[torch.Tensor], float], Any, int]:
    """(one training step, the engine or None, parameters)."""
    model = build(options.model, recompute=placement == "gpu")
    numel = sum(p.numel() for p in model.parameters())
    engine = None
    if placement == "gpu":
        model = model.to(device.torch_device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    else:
        state_nbytes = 16 * numel
        host_nbytes = options.host_memory_gb * 1e9 if placement == "storage" else 1.5 * state_nbytes + 1e9
        model, optimizer = offload.wrap(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-5),
            device=device.name,
            device_memory=f"{options.device_memory_gb}GB",
            host_memory=int(host_nbytes),
            storage=[storage] if placement == "storage" else [],
            micro_batches=max(1, batch // options.micro_batch),
            step_aside="never",
        )
        engine = model.offload

    def step(tokens: torch.Tensor) -> float:
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, engine, numel


def train(
    placement: str, options: argparse.Namespace, device: Device, batch: int, storage: str
) -> dict[str, Any]:
    """One row: `placement` is `gpu`, `host` or `storage`."""
    device.start_counting()
    step, engine, numel = make_step(placement, options, device, batch, storage)
    model_flops, hardware_flops = flops(options.model, numel, batch, options.tokens)
    tokens = torch.randint(
        0, SHAPES[options.model].vocab, (batch, options.tokens), device=device.torch_device
    )
    times, loss = [], float("nan")
    for _ in range(options.steps + WARM_UP_STEPS):
        device.synchronize()
        start_s = time.perf_counter()
        loss = step(tokens)
        device.synchronize()
        times.append(time.perf_counter() - start_s)
    step_s = common.median(times[WARM_UP_STEPS:])
    row = {
        "name": f"gpu_train_{options.model}_{batch}x{options.tokens}_{placement}",
        "step_s": step_s,
        "tokens_per_s": batch * options.tokens / step_s,
        "model_tflops": model_flops / step_s / 1e12,
        "hardware_tflops": hardware_flops / step_s / 1e12,
        "device_peak_bytes": device.peak_bytes(),
        "device_budget_bytes": options.device_memory_gb * 1e9 if engine else None,
        "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "stall_s": engine.last_step["stall_s"] if engine else None,
        "loss": loss,
    }
    if engine is not None:
        engine.close()
    return row


def main() -> None:
    """Every batch size in every placement, with the ratio to everything on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--batch", default="8,32", help="sequences a step, several separated by commas")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences on the device at once")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device-memory-gb", type=float, default=8.0)
    parser.add_argument("--host-memory-gb", type=float, default=8.0, help="of the row `storage`")
    parser.add_argument("--storage", help="directory on the drive; default: the current one")
    parser.add_argument("--json")
    options = parser.parse_args()
    device = Device(options.device)
    if device.is_cuda and not torch.cuda.is_available():
        raise SystemExit("gpu_train needs a CUDA device and a CUDA build of torch; or --device emulated")
    storage = tempfile.mkdtemp(prefix="offload-gpu-", dir=options.storage or ".")
    try:
        rows = []
        for batch in map(int, options.batch.split(",")):
            in_device, *streamed = (
                train(p, options, device, batch, storage) for p in ("gpu", "host", "storage")
            )
            for row in streamed:
                row["peer_step_s"] = in_device["step_s"]
                row["ratio"] = in_device["step_s"] / row["step_s"]
            rows += [in_device, *streamed]
        name = torch.cuda.get_device_name() if device.is_cuda else device.name
        rows = [{**row, **common.about(storage, device=name)} for row in rows]
        common.write_rows(options.json, rows, common.command_line("gpu_train", sys.argv[1:]))
    finally:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    main()

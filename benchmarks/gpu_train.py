"""Full fine-tune of a Llama-shaped model on one GPU: `device_memory` of 8 GB against everything on the GPU.

Prints tokens/s, model TFLOPS (6 FLOPs a parameter and token plus attention), hardware TFLOPS (forward counted
twice, for the recomputation) and what the device waited for. Run by benchmarks/gpu.sh; needs CUDA.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from typing import Any

import common
import torch
from llama_shaped import SHAPES, build


def flops(name: str, numel: int, batch: int, tokens: int) -> tuple[float, float]:
    """Model and hardware FLOPs of one step: backward is twice forward, recomputation is one more forward."""
    shape = SHAPES[name]
    embedding = shape.vocab * shape.hidden
    forward = 2 * (numel - embedding) * batch * tokens + 2 * shape.layers * batch * tokens**2 * shape.hidden
    return 3.0 * forward, 4.0 * forward


def train(name: str, placement: str, options: argparse.Namespace, storage: str) -> dict[str, Any]:
    """One row: `placement` is `offload` or `gpu`."""
    torch.cuda.reset_peak_memory_stats()
    model = build(name)
    numel = sum(p.numel() for p in model.parameters())
    model_flops, hardware_flops = flops(name, numel, options.batch, options.tokens)
    if placement == "offload":
        import offload

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        model, optimizer = offload.wrap(
            model.cuda() if numel * 2 < options.device_memory_gb * 1e9 else model,
            optimizer,
            device_memory=f"{options.device_memory_gb}GB",
            host_memory=f"{options.host_memory_gb}GB",
            storage=[storage],
        )
    else:
        model = model.cuda()
        model.recompute = True
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = torch.randint(0, SHAPES[name].vocab, (options.batch, options.tokens), device="cuda")
    times, stalls, loss = [], {}, float("nan")
    for _ in range(options.steps + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model(batch)
        out.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = float(out.detach())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if placement == "offload":
        stalls = model.offload.last_step["stall_s"]
        model.offload.close()
    step_s = common.median(times[2:])
    return {
        "name": f"gpu_train_{name}_{placement}",
        "step_s": step_s,
        "tokens_per_s": options.batch * options.tokens / step_s,
        "model_tflops": model_flops / step_s / 1e12,
        "hardware_tflops": hardware_flops / step_s / 1e12,
        "device_peak_bytes": torch.cuda.max_memory_allocated(),
        "stall_s": stalls,
        "loss": loss,
    }


def main() -> None:
    """Both placements, then the ratio between them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device-memory-gb", type=float, default=8.0)
    parser.add_argument("--host-memory-gb", type=float, default=8.0)
    parser.add_argument("--storage", help="directory on the drive; default: the current one")
    parser.add_argument("--json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_train needs a CUDA device and a CUDA build of torch")
    storage = tempfile.mkdtemp(prefix="offload-gpu-", dir=options.storage or ".")
    try:
        rows = [train(options.model, placement, options, storage) for placement in ("gpu", "offload")]
        rows[1]["ratio"] = rows[1]["step_s"] / rows[0]["step_s"]
        common.write_rows(
            options.json, rows, machine=common.machine(storage), gpu=torch.cuda.get_device_name()
        )
    finally:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    main()

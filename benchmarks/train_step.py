"""One training step: ours against a peer and against the floor, interleaved in one run.

Each side is a process of its own that trains the same Llama-shaped model in bf16, so that its memory can be measured;
the parent asks them for a few steps in turn, with fio in between. The floor of a row is the larger of the arithmetic
alone (plain torch, everything in memory) and the bytes the row's own counters report over fio's rate in the same
run: the faster of fio's mixed rate and of its separate read and write rates.

    python benchmarks/train_step.py --storage DIR --json FILE
    python benchmarks/train_step.py --peer deepspeed --peer-python VENV/bin/python

The peer's Python needs torch, deepspeed, ninja and the system's libaio; its operations compile at first use.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import common

BATCH, TOKENS = 1, 128
ROWS = ("storage", "half", "1b")
DEVICE_MEMORY = {"tiny": "8MB", "151m": "400MB", "1b": "1500MB"}
STATE_NBYTES_PER_PARAM = 12


# ---- workers: one process each, a step count a line on stdin, a JSON line back ---------------------------------


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
    maker = {"ours": make_ours, "memory": make_memory, "deepspeed": make_deepspeed}[options.worker]
    step, finish, counters, baseline_nbytes, numel = maker(options)
    torch.manual_seed(1)
    batch = torch.randint(0, 512, (BATCH, TOKENS))
    loss = float("nan")
    print(json.dumps({"numel": numel}), file=answers)
    for line in sys.stdin:
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


def process_counters() -> dict[str, int]:
    """Bytes this process had the kernel read from and write to drives."""
    fields = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
    return {"read_bytes": int(fields["read_bytes"]), "written_bytes": int(fields["write_bytes"])}


def make_ours(options: argparse.Namespace):
    """Training through `offload.wrap`, with a `host_memory` of staging alone or of a share of the state besides."""
    import torch
    from llama_shaped import build

    import offload
    from offload.config import Config
    from offload.transfer.io_engine import UpdatePipeline

    baseline_nbytes = memory_nbytes("VmRSS")
    model = build(options.model)
    numel = sum(p.numel() for p in model.parameters())
    defaults = Config()
    staging_nbytes = UpdatePipeline.buffer_nbytes_required(defaults.chunk_elements, defaults.chunk_buffers)
    model, optimizer = offload.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-4),
        device_memory=DEVICE_MEMORY[options.model],
        host_memory=staging_nbytes + int(options.host_share * numel * STATE_NBYTES_PER_PARAM),
        storage=[options.storage],
    )

    def step(batch):
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, model.offload.flush, model.offload.counters, baseline_nbytes, numel


def make_memory(options: argparse.Namespace):
    """The arithmetic alone: plain torch, bf16, fused AdamW, nothing moved and nothing recomputed."""
    import torch
    from llama_shaped import build

    baseline_nbytes = memory_nbytes("VmRSS")
    model = build(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch):
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, lambda: None, process_counters, baseline_nbytes, sum(p.numel() for p in model.parameters())


def make_deepspeed(options: argparse.Namespace):
    """ZeRO-Infinity on the CPU, parameters and optimizer on NVMe: the configuration of it that runs.

    Prefetching off and more buffers than its defaults: with either default it stops on an assertion.
    """
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

    baseline_nbytes = memory_nbytes("VmRSS")
    model = build(options.model, recompute=True)
    numel = sum(p.numel() for p in model.parameters())
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

    return step, lambda: None, process_counters, baseline_nbytes, numel


# ---- parent: rounds ------------------------------------------------------------------------------------------


class Side:
    """One worker process and what it has answered so far."""

    def __init__(self, python: str, kind: str, model: str, storage: str, *extra: str) -> None:
        self.kind = kind
        command = [python, __file__, "--worker", kind, "--model", model, "--storage", storage, *extra]
        self._log = pathlib.Path(storage, f"{kind}.log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.answers: list[dict[str, Any]] = []
        self.numel = int(self._read()["numel"])

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise SystemExit(f"{self.kind} stopped:\n" + self._log.read_text()[-3000:])
        return json.loads(line)

    def run(self, n_steps: int, *, keep: bool = True) -> None:
        """Take `n_steps` steps; `keep=False` for warming up."""
        self._process.stdin.write(f"{n_steps}\n")
        self._process.stdin.flush()
        answer = self._read()
        if keep:
            self.answers.append(answer)

    def middle(self, key: str) -> float:
        """Median over the rounds."""
        return common.median([a[key] for a in self.answers])

    def close(self) -> None:
        """End the process, and wait for it."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def floor_seconds(
    read_bytes: float, written_bytes: float, rates: dict[str, list[float]], arithmetic_s: float
) -> float:
    """max(arithmetic alone, counted bytes over fio's rate, whichever way of asking fio is faster)."""
    separate_s = read_bytes / common.median(rates["read"]) + written_bytes / common.median(rates["write"])
    mixed_s = (read_bytes + written_bytes) / common.median(rates["rw"])
    return max(arithmetic_s, min(separate_s, mixed_s))


def measure(name: str, options: argparse.Namespace, storage: str) -> dict[str, Any]:
    """One row: rounds of ours, arithmetic, fio and, where asked and not the 1 B model, the peer."""
    model = "1b" if name == "1b" else options.model
    share = 0.5 if name == "half" else 0.0
    sides: list[Side] = []
    peer = None
    rates: dict[str, list[float]] = {"read": [], "write": [], "rw": []}
    try:
        ours = Side(sys.executable, "ours", model, storage, "--host-share", str(share))
        sides.append(ours)
        memory = Side(sys.executable, "memory", model, storage)
        sides.append(memory)
        if options.peer and name != "1b":
            extra = [
                "--peer-params",
                options.peer_params,
                "--peer-sub-group-size",
                str(options.peer_sub_group_size),
            ]
            peer = Side(options.peer_python, options.peer, model, storage, *extra)
            sides.append(peer)
        for side in sides:
            side.run(2, keep=False)
        for _ in range(options.rounds):
            for side in sides:
                side.run(options.steps)
            for mode, measured in rates.items():
                measured.append(common.fio(storage, mode, read_percent=54))
    finally:
        for side in sides:
            side.close()
    return summarize(name, model, share, ours, memory, peer, rates)


def summarize(
    name: str,
    model: str,
    share: float,
    ours: Side,
    memory: Side,
    peer: Side | None,
    rates: dict[str, list[float]],
) -> dict[str, Any]:
    """The row's figures: medians, with the spread of the times."""
    read_bytes, written_bytes = ours.middle("read_bytes"), ours.middle("written_bytes")
    step_s = ours.middle("step_s")
    floor_s = floor_seconds(read_bytes, written_bytes, rates, memory.middle("step_s"))
    row: dict[str, Any] = {
        "name": f"train_step_{model}_{name}" if name != "1b" else "train_step_1b_storage",
        "parameters": ours.numel,
        "host_share": share,
        "step_s": step_s,
        "step_s_spread": [min(a["step_s"] for a in ours.answers), max(a["step_s"] for a in ours.answers)],
        "arithmetic_s": memory.middle("step_s"),
        "floor_s": floor_s,
        "floor_ratio": step_s / floor_s,
        "fio_read_bytes_per_s": common.median(rates["read"]),
        "fio_write_bytes_per_s": common.median(rates["write"]),
        "fio_mixed_bytes_per_s": common.median(rates["rw"]),
        "rss_over_baseline_bytes": max(a["rss_over_baseline_bytes"] for a in ours.answers),
        "memory_rss_over_baseline_bytes": max(a["rss_over_baseline_bytes"] for a in memory.answers),
        "read_bytes_per_param": read_bytes / ours.numel,
        "written_bytes_per_param": written_bytes / ours.numel,
        "loss": ours.answers[-1]["loss"],
        "memory_loss": memory.answers[-1]["loss"],
    }
    if peer is not None:
        row |= {
            "peer": peer.kind,
            "peer_step_s": peer.middle("step_s"),
            "peer_step_s_spread": [
                min(a["step_s"] for a in peer.answers),
                max(a["step_s"] for a in peer.answers),
            ],
            "speedup": peer.middle("step_s") / step_s,
            "peer_rss_over_baseline_bytes": max(a["rss_over_baseline_bytes"] for a in peer.answers),
            "peer_loss": peer.answers[-1]["loss"],
        }
    return row


def main() -> None:
    """Parse, measure the rows asked for, print and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(DEVICE_MEMORY), default="151m")
    parser.add_argument("--rows", default="storage,half", help=f"comma-separated, of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps a side takes in one round")
    parser.add_argument("--storage", help="directory on the drive to measure; default: the current one")
    parser.add_argument("--peer", choices=["deepspeed"])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-params", choices=["nvme", "cpu"], default="nvme")
    parser.add_argument("--peer-sub-group-size", type=int, default=1_000_000_000)
    parser.add_argument("--json")
    parser.add_argument("--worker", choices=["ours", "memory", "deepspeed"], help=argparse.SUPPRESS)
    parser.add_argument("--host-share", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    unknown = set(options.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"unknown rows {sorted(unknown)}")
    common.need_fio()
    storage = tempfile.mkdtemp(prefix="offload-bench-", dir=options.storage or os.getcwd())
    try:
        rows = [measure(name, options, storage) for name in options.rows.split(",")]
        common.write_rows(options.json, rows, machine=common.machine(storage))
    finally:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    main()

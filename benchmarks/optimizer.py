"""The optimizer against its two limits: the kernel beside other fused AdamWs, the out-of-core update beside fio.

In memory: `ratio` is bytes moved per second by our kernel over bytes moved per second by the best peer, one thread
each, as the median over interleaved rounds. The peers are torch's fused AdamW and, where it is installed,
DeepSpeedCPUAdam, both in fp32. An fp32 update moves 28 bytes a parameter (reads and writes p, m and v, reads g), a
split-master one as many (2 + 2 for p). A bf16 gradient makes it 26, moments in bf16 20, in 8 bits 16 and a bit.

Out of core: `floor_s` is the time fio needs beside it for the bytes the engine counted, at the same depth, in its
fastest form (see common.py): in blocks of ours or of 1 MiB, mixed in the same proportion or reads and then writes,
whichever is fastest; `floor_ratio` is step_s / floor_s, the median over interleaved rounds. GB is 10^9 bytes.
Contents are compared with the in-memory kernel after the steps of every round.
"""

from __future__ import annotations

import os

# One thread on every side; DeepSpeed's extension has an OpenMP runtime of its own that only listens to this.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import random
import sys
import tempfile
from typing import Any

import torch
from common import about, command_line, median, need_fio, spread, write_rows
from out_of_core import OutOfCore, Step, fio_floor_s, moved, seconds_of

from offload import _C
from offload.config import Config
from offload.update_rules import QUANT_BLOCK_ELEMENTS, Moments, kernel_rule

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def fp32_parameter(n: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(n))
    parameter.grad = torch.randn(n)
    return parameter


def torch_fused(n: int) -> Step:
    settings = {name: HYPER[name] for name in ("lr", "eps", "weight_decay")}
    return torch.optim.AdamW([fp32_parameter(n)], betas=(0.9, 0.999), fused=True, **settings).step


def deepspeed_cpu_adam(n: int) -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # type: ignore[import-not-found, unused-ignore]

    settings = {name: HYPER[name] for name in ("lr", "eps", "weight_decay")}
    return DeepSpeedCPUAdam([fp32_parameter(n)], betas=(0.9, 0.999), adamw_mode=True, **settings).step


def make_peers(n: int) -> dict[str, Step]:
    peers = {"torch.optim.AdamW(fused=True)": torch_fused(n)}
    try:
        peers["DeepSpeedCPUAdam"] = deepspeed_cpu_adam(n)
    except Exception as error:
        print(
            f"peer DeepSpeedCPUAdam is not measured: {type(error).__name__}: {error}"[:200], file=sys.stderr
        )
    return peers


def our_kernel(n: int, codec: str, grad_dtype: str, moments: Moments, level: str) -> Step:
    master, rule = torch.randn(n), kernel_rule("adamw", moments)
    state = [torch.zeros(plane.nbytes(n), dtype=torch.uint8) for plane in rule.planes]
    scales = [torch.zeros(-(-n // QUANT_BLOCK_ELEMENTS)) for _ in rule.planes]
    grad = torch.randn(n).to(getattr(torch, grad_dtype))
    param, lo = master, torch.empty(n, dtype=torch.int16)
    if codec == "split_bf16":
        param = torch.empty(n, dtype=torch.int16)
        _C.split_master(master.data_ptr(), param.data_ptr(), lo.data_ptr(), n)
    hyper = _C.Hyper(**HYPER, step=10)

    def step() -> None:
        _C.rule_update(
            rule.name, rule.kinds, codec, param.data_ptr(), lo.data_ptr(), [p.data_ptr() for p in state],
            [s.data_ptr() for s in scales], grad.data_ptr(), grad_dtype, n, hyper, level=level,
        )  # fmt: skip

    return step


def nbytes_moved(n: int, grad_dtype: str, moments: Moments) -> int:
    state = sum(plane.nbytes(n) for plane in kernel_rule("adamw", moments).planes)
    return 8 * n + 2 * state + n * (4 if grad_dtype == "float32" else 2)


def in_memory_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    n = arguments.elements
    levels = _C.simd_levels() if arguments.all_levels else _C.simd_levels()[-1:]
    cases: list[tuple[str, str, Moments]] = [
        ("fp32", "float32", "fp32"),
        ("split_bf16", "float32", "fp32"),
        ("split_bf16", "bfloat16", "fp32"),
        ("split_bf16", "float32", "bf16"),
        ("split_bf16", "float32", "8bit"),
    ]
    peers = make_peers(n)
    return [in_memory_row(n, *case, level, peers, arguments.rounds) for case in cases for level in levels]


def in_memory_row(
    n: int, codec: str, grad_dtype: str, moments: Moments, level: str, peers: dict[str, Step], rounds: int
) -> dict[str, Any]:
    sides = {"offload": our_kernel(n, codec, grad_dtype, moments, level), **peers}
    nbytes = dict.fromkeys(peers, 28 * n) | {"offload": nbytes_moved(n, grad_dtype, moments)}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffler = list(sides), random.Random(0)
    for round_index in range(4 * rounds + 1):
        shuffler.shuffle(order)
        for name in order:
            gb_per_s = nbytes[name] / seconds_of(sides[name]) / 1e9
            if round_index > 0:  # the first round allocates the peers' states
                samples[name].append(gb_per_s)
    rate = {name: median(values) for name, values in samples.items()}
    best = max(peers, key=lambda name: rate[name])
    ratios = [ours / peer for ours, peer in zip(samples["offload"], samples[best], strict=True)]
    which = "" if moments == "fp32" else f"{moments}_"
    return {
        "name": f"kernel_{codec}_grad_{grad_dtype}_{which}{level}",
        "ratio": round(median(ratios), 3),
        "ratio_spread": spread(ratios),
        "gb_per_s": round(rate["offload"], 2),
        "gb_per_s_spread": spread(samples["offload"], 2),
        "params_per_s": round(rate["offload"] * 1e9 / nbytes["offload"] * n),
        "peer": f"{best}, fp32",
        "peer_gb_per_s": round(rate[best], 2),
        "peer_gb_per_s_spread": spread(samples[best], 2),
        "peers_gb_per_s": {name: round(rate[name], 2) for name in peers},
        "threads": 1,
        "elements": n,
    }


def storage_row(directory: str, arguments: argparse.Namespace, read_param: bool) -> dict[str, Any]:
    work = OutOfCore(directory, kernel_rule("adamw", "fp32"), arguments, read_param)
    step_s, floors, kernel_s = [], [], []
    for round_index in range(arguments.rounds + 1):
        read, written = moved(work.engine)
        before = work.pipeline.stats()["kernel_s"]
        seconds = sum(seconds_of(work.step) for _ in range(arguments.steps)) / arguments.steps
        kernel = (work.pipeline.stats()["kernel_s"] - before) / arguments.steps
        after = moved(work.engine)
        read, written = (
            (end - start) // arguments.steps for end, start in zip(after, (read, written), strict=True)
        )
        work.verify()
        floor = fio_floor_s(work, read, written, arguments)
        work.fill()
        if round_index > 0:  # the first round warms the drive
            step_s.append(seconds)
            floors.append(floor)
            kernel_s.append(kernel)
    backend = work.engine.backend
    work.close()
    ways = {way: median([floor[way] for floor in floors]) for way in floors[0]}
    way = min(ways, key=lambda name: ways[name])
    ratios = [seconds / floor[way] for seconds, floor in zip(step_s, floors, strict=True)]
    numel = work.n * work.n_jobs
    return {
        "name": "out_of_core_split_bf16" + ("_read_param" if read_param else ""),
        "step_s": round(median(step_s), 4),
        "step_s_spread": spread(step_s, 4),
        "floor_s": round(ways[way], 4),
        "floor_s_spread": spread([floor[way] for floor in floors], 4),
        "floor_ratio": round(median(ratios), 3),
        "floor_ratio_spread": spread(ratios),
        "floor": f"fio io_uring on huge pages, {way}",
        "floors_s": {name: round(seconds, 4) for name, seconds in ways.items()},
        "kernel_s": round(median(kernel_s), 4),
        "read_bytes_per_param": round(read / numel, 3),
        "written_bytes_per_param": round(written / numel, 3),
        "gb_per_s": round((read + written) / median(step_s) / 1e9, 3),
        "elements": numel,
        "block_nbytes": arguments.block_nbytes,
        "queue_depth": arguments.queue_depth,
        "backend": backend,
        "registered": work.registered,
        "contents_verified": True,
    }


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there as JSON")
    parser.add_argument("--directory", default=".", help="on the drive to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--elements", type=int, default=1 << 24, help="of the in-memory rows")
    parser.add_argument("--all-levels", action="store_true", help="in-memory rows of every instruction set")
    parser.add_argument("--storage-elements", type=int, default=1 << 26, help="of the out-of-core rows")
    parser.add_argument("--steps", type=int, default=3, help="in one round of the out-of-core rows")
    parser.add_argument("--jobs", type=int, default=4, help="flat buffers updated in one step")
    parser.add_argument("--chunk-elements", type=int, default=Config().chunk_elements)
    parser.add_argument("--buffers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block-nbytes", type=int, default=Config().io_block_nbytes)
    parser.add_argument("--queue-depth", type=int, default=Config().io_queue_depth)
    parser.add_argument("--only", choices=["memory", "storage"])
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = arguments_of(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if arguments.only != "storage":
        rows += in_memory_rows(arguments)
    if arguments.only != "memory":
        need_fio()
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            rows += [storage_row(directory, arguments, read_param) for read_param in (False, True)]
    facts = about(arguments.directory, backend="none", rounds=arguments.rounds)
    write_rows(arguments.json, [facts | row for row in rows], command_line(sys.argv[0], argv))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Bytes and time of one out-of-core step for every optimizer: what is stored, read and written for a parameter.

Bytes are counted by the engine. `floor_s` is the time fio needs beside it for as many bytes, as in optimizer.py;
`floor_ratio` is step_s / floor_s, the median over interleaved rounds. `kernel_s` is the time inside kernels, one
thread. Masters are split, gradients fp32 and in memory, as in training on a CPU. After the steps of every round the
parameters are compared with the in-memory kernel's. `--bytes-only` leaves out fio and every time, for a machine that
does something else meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import torch
from common import about, command_line, median, need_fio, spread, write_rows
from out_of_core import OutOfCore, fio_floor_s, moved, seconds_of

from offload.config import Config
from offload.update_rules import kernel_rule

CASES = {
    **{f"adamw_{moments}": kernel_rule("adamw", moments) for moments in ("fp32", "bf16", "8bit")},
    **{f"lion_{moments}": kernel_rule("lion", moments) for moments in ("fp32", "bf16", "8bit")},
    **{f"sgd_{moments}": kernel_rule("sgd", moments) for moments in ("fp32", "bf16", "8bit")},
    "sgd_without_momentum": kernel_rule("sgd", has_momentum=False),
}


def row(name: str, directory: str, arguments: argparse.Namespace) -> dict[str, Any]:
    work = OutOfCore(directory, CASES[name], arguments)
    step_s, floors, kernel_s = [], [], []
    for round_index in range(arguments.rounds + 1):
        before, kernel = moved(work.engine), work.pipeline.stats()["kernel_s"]
        seconds = sum(seconds_of(work.step) for _ in range(arguments.steps)) / arguments.steps
        kernel = (work.pipeline.stats()["kernel_s"] - kernel) / arguments.steps
        after = moved(work.engine)
        read, written = ((end - start) // arguments.steps for end, start in zip(after, before, strict=True))
        work.verify()
        if arguments.bytes_only:
            continue
        floor = fio_floor_s(work, read, written, arguments)
        work.fill()
        if round_index > 0:  # the first round warms the drive
            step_s.append(seconds)
            floors.append(min(floor.values()))
            kernel_s.append(kernel)
    work.close()
    numel = work.n * work.n_jobs
    moves = {
        "name": name,
        "stored_bytes_per_param": round(2 + work.state_nbytes / work.n, 3),
        "read_bytes_per_param": round(read / numel, 3),
        "written_bytes_per_param": round(written / numel, 3),
        "elements": numel,
        "contents_verified": True,
    }
    if arguments.bytes_only:
        return moves
    ratios = [seconds / floor for seconds, floor in zip(step_s, floors, strict=True)]
    return moves | {
        "step_s": round(median(step_s), 4),
        "step_s_spread": spread(step_s, 4),
        "params_per_s": round(numel / median(step_s)),
        "floor_s": round(median(floors), 4),
        "floor_ratio": round(median(ratios), 3),
        "floor_ratio_spread": spread(ratios),
        "kernel_s": round(median(kernel_s), 4),
        "kernel_params_per_s": round(numel / median(kernel_s)),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there as JSON")
    parser.add_argument("--directory", default=".", help="on the drive to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--storage-elements", type=int, default=1 << 25)
    parser.add_argument("--steps", type=int, default=2, help="in one round")
    parser.add_argument("--jobs", type=int, default=4, help="flat buffers updated in one step")
    parser.add_argument("--chunk-elements", type=int, default=Config().chunk_elements)
    parser.add_argument("--buffers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block-nbytes", type=int, default=Config().io_block_nbytes)
    parser.add_argument("--queue-depth", type=int, default=Config().io_queue_depth)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--bytes-only", action="store_true", help="no times, one round")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.bytes_only:
        arguments.rounds = 0
    else:
        need_fio()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        rows = [row(name, directory, arguments) for name in arguments.only]
    facts = about(arguments.directory, rounds=arguments.rounds)
    write_rows(arguments.json, [facts | found for found in rows], command_line(sys.argv[0], argv))


if __name__ == "__main__":
    main(sys.argv[1:])

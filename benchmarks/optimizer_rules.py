"""Bytes and time of one out-of-core step for every optimizer: what is stored, read and written for a parameter.

Bytes are counted by the engine. `floor_s` is the time fio needs beside it for as many bytes, as in optimizer.py;
`floor_ratio` is step_s / floor_s, the median over interleaved rounds. `kernel_s` is the time inside kernels, one
thread. Masters are split, gradients fp32 and in memory, as in training on a CPU. After the steps of every round the
parameters are compared with the in-memory kernel's. `--bytes-only` leaves out fio and every time, for a machine that
does something else meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from common import about, command_line, median, need_fio, spread, write_rows
from optimizer import fio_floor_s, moved, seconds_of

from offload import _C
from offload.config import Config
from offload.types import PAGE_NBYTES, round_up
from offload.update_rules import UpdateRule, kernel_rule

CODEC = "split_bf16"
CASES = {
    **{f"adamw_{moments}": kernel_rule("adamw", moments) for moments in ("fp32", "bf16", "8bit")},
    **{f"lion_{moments}": kernel_rule("lion", moments) for moments in ("fp32", "bf16", "8bit")},
    **{f"sgd_{moments}": kernel_rule("sgd", moments) for moments in ("fp32", "bf16", "8bit")},
    "sgd_without_momentum": kernel_rule("sgd", has_momentum=False),
}


def hyper_of(rule: UpdateRule, step: int) -> _C.Hyper:
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    momentum = 0.9 if rule.name == "sgd" and rule.planes else 0.0
    return _C.Hyper(1e-3, step=step, momentum=momentum, noise_seed=1, **settings)


class OutOfCore:
    """The state of `n_jobs` flat buffers on one drive; every step updates them all."""

    def __init__(self, directory: str, rule: UpdateRule, arguments: argparse.Namespace) -> None:
        self.rule, self.n_jobs = rule, arguments.jobs
        self.chunk_elements = arguments.chunk_elements
        self.n = arguments.storage_elements // self.n_jobs // 2048 * 2048
        self.path = os.path.join(directory, "state.bin")
        self.state_nbytes = rule.state_nbytes(CODEC, self.n, self.chunk_elements)
        self.job_nbytes = round_up(self.n * 2 + self.state_nbytes, PAGE_NBYTES)
        with open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.job_nbytes * self.n_jobs)
        self.engine = _C.Engine(
            [self.path], block_nbytes=arguments.block_nbytes, queue_depth=arguments.queue_depth
        )
        need = _C.UpdatePipeline.buffer_nbytes_required(self.chunk_elements, arguments.buffers)
        self.buffers = _C.Arena(need)
        self.planes = _C.Arena(self.n * 2 * self.n_jobs)
        self.hi = torch.from_numpy(np.frombuffer(self.planes, dtype=np.int16)).view(self.n_jobs, self.n)
        self.engine.register_buffer(self.buffers.address, need)
        self.engine.register_buffer(self.planes.address, self.planes.nbytes)
        self.pipeline = _C.UpdatePipeline(
            self.engine, self.chunk_elements, arguments.buffers, 1, self.buffers.address, need
        )
        generator = torch.Generator().manual_seed(0)
        self.master = torch.randn(self.n, generator=generator)
        self.grad = torch.randn(self.n, generator=generator)
        self.fill()

    def fill(self) -> None:
        """The same masters in every job; state of zero."""
        self.steps_done = 0
        arena = _C.Arena(max(PAGE_NBYTES, self.state_nbytes))
        state = torch.from_numpy(np.frombuffer(arena, dtype=np.uint8))
        lo = torch.empty(self.n, dtype=torch.int16)
        for job in range(self.n_jobs):
            _C.split_master(self.master.data_ptr(), self.hi[job].data_ptr(), lo.data_ptr(), self.n)
            for index, start in enumerate(range(0, self.n, self.chunk_elements)):
                plane = lo[start : start + self.chunk_elements].view(torch.uint8)
                begin = index * self.rule.record_nbytes(CODEC, self.chunk_elements)
                state[begin : begin + plane.numel()] = plane
            base = job * self.job_nbytes
            self.engine.write(arena.address, self.state_nbytes, base + self.n * 2).wait()
            self.engine.write(self.hi[job].data_ptr(), self.n * 2, base).wait()

    def step(self) -> None:
        self.steps_done += 1
        tickets = []
        for job in range(self.n_jobs):
            base = job * self.job_nbytes
            update = _C.UpdateJob(
                rule=self.rule.name, state_planes=self.rule.kinds, param_codec=CODEC, n_elements=self.n,
                param_address=self.hi[job].data_ptr(), param_offset=base, state_offset=base + self.n * 2,
                grad_address=self.grad.data_ptr(), segments=[(0, self.n, hyper_of(self.rule, self.steps_done))],
            )  # fmt: skip
            tickets.append(self.pipeline.submit(update))
        for ticket in tickets:
            ticket.wait()

    def verify(self) -> None:
        """Compares every parameter plane with the same steps in memory."""
        hi, lo = torch.empty(self.n, dtype=torch.int16), torch.empty(self.n, dtype=torch.int16)
        _C.split_master(self.master.data_ptr(), hi.data_ptr(), lo.data_ptr(), self.n)
        planes = [torch.zeros(plane.nbytes(self.n), dtype=torch.uint8) for plane in self.rule.planes]
        for step in range(1, self.steps_done + 1):
            _C.rule_update(
                self.rule.name, self.rule.kinds, CODEC, hi.data_ptr(), lo.data_ptr(),
                [plane.data_ptr() for plane in planes], [plane.data_ptr() + self.n for plane in planes],
                self.grad.data_ptr(), "float32", self.n, hyper_of(self.rule, step),
            )  # fmt: skip
        if not torch.equal(self.hi, hi.expand_as(self.hi)):
            raise SystemExit("the out-of-core update differs from the in-memory one")

    def close(self) -> None:
        self.pipeline.close()
        self.engine.close()
        os.unlink(self.path)


def row(name: str, directory: str, arguments: argparse.Namespace) -> dict[str, Any]:
    work = OutOfCore(directory, CASES[name], arguments)
    step_s, floors, kernel_s = [], [], []
    for round_index in range(arguments.rounds + 1):
        before, kernel = moved(work.engine), work.pipeline.stats()["kernel_s"]
        seconds = sum(seconds_of(work.step) for _ in range(arguments.steps)) / arguments.steps
        kernel = (work.pipeline.stats()["kernel_s"] - kernel) / arguments.steps
        after = moved(work.engine)
        read, written = ((now - then) // arguments.steps for now, then in zip(after, before, strict=True))
        work.verify()
        if arguments.bytes_only:
            continue
        floor = fio_floor_s(work, read, written, arguments)  # type: ignore[arg-type]
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

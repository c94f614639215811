"""The optimizer against its two limits: the kernel beside torch's fused AdamW, the out-of-core update beside fio.

In memory: `ratio` is bytes moved per second by our kernel over bytes moved per second by torch's fused AdamW, one
thread each, as the median over interleaved rounds. An fp32 update moves 28 bytes a parameter (reads and writes p, m
and v, reads g), a split-master one as many (2 + 2 for p). A bf16 gradient makes it 26.

Out of core: `floor_s` is the time fio needs beside it to move the same number of bytes in the same mix of reads and
writes, same block size and depth, registered buffers; `floor_ratio` is step_s / floor_s. The engine counts the bytes.
fio is a peer, not a proof of the limit: on a busy or shared drive look at the spread before the median.
GB is 10^9 bytes. Contents are compared with the in-memory kernel after timing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import machine, need_fio, write_rows

from offload import _C

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> list[float]:
    return [round(min(values), 3), round(max(values), 3)]


def torch_fused(n: int) -> Callable[[], object]:
    parameter = torch.nn.Parameter(torch.randn(n))
    parameter.grad = torch.randn(n)
    settings = {name: HYPER[name] for name in ("lr", "eps", "weight_decay")}
    return torch.optim.AdamW([parameter], betas=(0.9, 0.999), fused=True, **settings).step


def our_kernel(n: int, codec: str, grad_dtype: str, level: str) -> Callable[[], object]:
    master, exp_avg, exp_avg_sq = torch.randn(n), torch.zeros(n), torch.zeros(n)
    grad = torch.randn(n).to(getattr(torch, grad_dtype))
    param, lo = master, torch.empty(n, dtype=torch.int16)
    if codec == "split_bf16":
        param = torch.empty(n, dtype=torch.int16)
        _C.split_master(master.data_ptr(), param.data_ptr(), lo.data_ptr(), n)
    hyper = _C.Hyper(**HYPER, step=10)

    def step() -> None:
        _C.adamw_update(
            codec, param.data_ptr(), lo.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
            grad.data_ptr(), grad_dtype, n, hyper, level,
        )  # fmt: skip

    return step


def in_memory_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    n = arguments.elements
    cases = [("fp32", "float32"), ("split_bf16", "float32"), ("split_bf16", "bfloat16")]
    rows = []
    for codec, grad_dtype in cases:
        for level in _C.simd_levels():
            # Fresh memory on both sides; ours before and after the peer, so that a drift meets both.
            ours, theirs = our_kernel(n, codec, grad_dtype, level), torch_fused(n)
            ours(), theirs()
            nbytes = n * (28 if grad_dtype == "float32" else 26)
            times = [(seconds_of(ours), seconds_of(theirs)) for _ in range(arguments.rounds)]
            ratios = [(nbytes / our_s) / (n * 28 / their_s) for our_s, their_s in times]
            rows.append(
                {
                    "name": f"kernel_{codec}_grad_{grad_dtype}_{level}",
                    "ratio": round(statistics.median(ratios), 3),
                    "ratio_spread": spread(ratios),
                    "peer": "torch.optim.AdamW(fused=True), fp32, one thread",
                    "GB_per_s": round(nbytes / statistics.median(our_s for our_s, _ in times) / 1e9, 2),
                    "peer_GB_per_s": round(
                        28 * n / statistics.median(peer_s for _, peer_s in times) / 1e9, 2
                    ),
                    "elements": n,
                }
            )
    return rows


class OutOfCore:
    """A split-master state of `n_jobs` flat buffers on one drive; every step updates them all."""

    def __init__(self, directory: str, arguments: argparse.Namespace, read_param: bool) -> None:
        self.n_jobs, self.read_param = arguments.jobs, read_param
        self.n = arguments.storage_elements // self.n_jobs // 2048 * 2048
        self.chunk_elements = arguments.chunk_elements
        self.path = os.path.join(directory, "state.bin")
        self.job_nbytes = self.n * 12
        with open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.job_nbytes * self.n_jobs)
        self.engine = _C.Engine(
            [self.path], block_nbytes=arguments.block_nbytes, queue_depth=arguments.queue_depth
        )
        need = _C.UpdatePipeline.buffer_nbytes_required(self.chunk_elements, arguments.buffers)
        self.buffers = _C.Arena(need)
        self.planes = _C.Arena(self.n * 2 * self.n_jobs)
        self.hi = torch.from_numpy(np.frombuffer(self.planes, dtype=np.int16)).view(self.n_jobs, self.n)
        self.registered = self.engine.register_buffer(self.buffers.address, need)
        self.registered &= self.engine.register_buffer(self.planes.address, self.planes.nbytes)
        self.pipeline = _C.UpdatePipeline(
            self.engine, self.chunk_elements, arguments.buffers, arguments.threads, self.buffers.address, need
        )
        generator = torch.Generator().manual_seed(0)
        self.master = torch.randn(self.n, generator=generator)
        self.grad = torch.randn(self.n, generator=generator)
        self.steps_done = 0
        self.fill()

    def fill(self) -> None:
        """The same masters in every job; moments of zero."""
        arena = _C.Arena(self.n * 10)
        record = torch.from_numpy(np.frombuffer(arena, dtype=np.uint8))
        lo = torch.empty(self.n, dtype=torch.int16)
        for job in range(self.n_jobs):
            _C.split_master(self.master.data_ptr(), self.hi[job].data_ptr(), lo.data_ptr(), self.n)
            for start in range(0, self.n, self.chunk_elements):
                plane = lo[start : start + self.chunk_elements].view(torch.uint8)
                record[start * 10 : start * 10 + plane.numel()] = plane
            base = job * self.job_nbytes
            tickets = [self.engine.write(arena.address, self.n * 10, base + self.n * 2)]
            tickets.append(self.engine.write(self.hi[job].data_ptr(), self.n * 2, base))
            for ticket in tickets:
                ticket.wait()

    def step(self) -> None:
        self.steps_done += 1
        hyper = _C.Hyper(**HYPER, step=self.steps_done)
        tickets = []
        for job in range(self.n_jobs):
            base = job * self.job_nbytes
            update = _C.UpdateJob(
                param_codec="split_bf16", n_elements=self.n, param_address=self.hi[job].data_ptr(),
                param_offset=base, read_param=self.read_param, state_offset=base + self.n * 2,
                grad_address=self.grad.data_ptr(), segments=[(0, self.n, hyper)],
            )  # fmt: skip
            tickets.append(self.pipeline.submit(update))
        for ticket in tickets:
            ticket.wait()

    def verify(self) -> None:
        """Compares every parameter plane with the same steps in memory."""
        hi, lo = torch.empty(self.n, dtype=torch.int16), torch.empty(self.n, dtype=torch.int16)
        exp_avg, exp_avg_sq = torch.zeros(self.n), torch.zeros(self.n)
        _C.split_master(self.master.data_ptr(), hi.data_ptr(), lo.data_ptr(), self.n)
        for step in range(1, self.steps_done + 1):
            _C.adamw_update(
                "split_bf16", hi.data_ptr(), lo.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
                self.grad.data_ptr(), "float32", self.n, _C.Hyper(**HYPER, step=step),
            )  # fmt: skip
        if not torch.equal(self.hi, hi.expand_as(self.hi)):
            raise SystemExit("the out-of-core update differs from the in-memory one")

    def close(self) -> None:
        self.pipeline.close()
        self.engine.close()
        os.unlink(self.path)


def moved(engine: _C.Engine) -> tuple[int, int]:
    counters = engine.counters()
    return counters["read_bytes"], counters["written_bytes"]


def fio_floor_s(path: str, read_nbytes: int, written_nbytes: int, arguments: argparse.Namespace) -> float:
    """Seconds fio needs for as many bytes in the same mix, in its fastest form: registered buffers and file."""
    command = [
        *("fio", "--name=floor", f"--filename={path}", f"--size={read_nbytes + written_nbytes}", "--rw=rw"),
        *("--overwrite=1", f"--rwmixread={round(100 * read_nbytes / (read_nbytes + written_nbytes))}"),
        *(f"--bs={arguments.block_nbytes}", f"--iodepth={arguments.queue_depth}", "--ioengine=io_uring"),
        *("--direct=1", "--fixedbufs=1", "--registerfiles=1", "--scramble_buffers=0", "--output-format=json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fio failed: {done.stderr or done.stdout}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    nbytes = job["read"]["io_bytes"] + job["write"]["io_bytes"]
    runtime_s = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
    return runtime_s * (read_nbytes + written_nbytes) / nbytes


def storage_row(directory: str, arguments: argparse.Namespace, read_param: bool) -> dict[str, Any]:
    work = OutOfCore(directory, arguments, read_param)
    work.step()
    work_s, floor_s, kernel_s, wait_s = [], [], [], []
    for _ in range(arguments.rounds):
        read, written = moved(work.engine)
        before = work.pipeline.stats()
        work_s.append(seconds_of(work.step))
        after = work.pipeline.stats()
        kernel_s.append(after["kernel_s"] - before["kernel_s"])
        wait_s.append(after["wait_read_s"] - before["wait_read_s"])
        read, written = (now - then for now, then in zip(moved(work.engine), (read, written), strict=True))
        floor_s.append(fio_floor_s(work.path + ".fio", read, written, arguments))
    backend = work.engine.backend
    work.verify()
    work.close()
    ratios = [step / floor for step, floor in zip(work_s, floor_s, strict=True)]
    return {
        "name": "out_of_core_split_bf16" + ("_read_param" if read_param else ""),
        "step_s": round(statistics.median(work_s), 3),
        "floor_s": round(statistics.median(floor_s), 3),
        "floor_ratio": round(statistics.median(ratios), 3),
        "floor_ratio_spread": spread(ratios),
        "kernel_s": round(statistics.median(kernel_s), 3),
        "wait_read_s": round(statistics.median(wait_s), 3),
        "read_bytes": read,
        "written_bytes": written,
        "elements": work.n * work.n_jobs,
        "backend": backend,
        "registered": work.registered,
        "peer": "fio io_uring, same bytes, same mix",
    }


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there as JSON")
    parser.add_argument("--directory", default=".", help="on the drive to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--elements", type=int, default=1 << 24, help="of the in-memory rows")
    parser.add_argument("--storage-elements", type=int, default=1 << 25, help="of the out-of-core rows")
    parser.add_argument("--jobs", type=int, default=4, help="flat buffers updated in one step")
    parser.add_argument("--chunk-elements", type=int, default=1 << 18)
    parser.add_argument("--buffers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block-nbytes", type=int, default=1 << 20)
    parser.add_argument("--queue-depth", type=int, default=32)
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
    command = subprocess.list2cmdline(["python", "benchmarks/optimizer.py", *argv])
    write_rows(
        arguments.json, rows, command=command, machine=machine(arguments.directory), torch=torch.__version__
    )


if __name__ == "__main__":
    main(sys.argv[1:])

"""The out-of-core update of flat buffers on one drive, and the time fio needs for as many bytes."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from common import fio

from offload import _C
from offload.types import PAGE_NBYTES, round_up
from offload.update_rules import UpdateRule

FIO_BLOCK_NBYTES = 1 << 20
CODEC = "split_bf16"
Step = Callable[[], object]


def seconds_of(work: Step) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def hyper_of(rule: UpdateRule, step: int) -> _C.Hyper:
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    momentum = 0.9 if rule.name == "sgd" and rule.planes else 0.0
    return _C.Hyper(1e-3, step=step, momentum=momentum, noise_seed=1, **settings)


class OutOfCore:
    """The state of `n_jobs` flat buffers on one drive; every step updates them all."""

    def __init__(
        self, directory: str, rule: UpdateRule, arguments: argparse.Namespace, read_param: bool = False
    ) -> None:
        self.rule, self.n_jobs, self.read_param = rule, arguments.jobs, read_param
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
        self.registered = self.engine.register_buffer(self.buffers.address, need)
        self.registered &= self.engine.register_buffer(self.planes.address, self.planes.nbytes)
        self.pipeline = _C.UpdatePipeline(
            self.engine, self.chunk_elements, arguments.buffers, arguments.threads, self.buffers.address, need
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
                param_address=self.hi[job].data_ptr(), param_offset=base, read_param=self.read_param,
                state_offset=base + self.n * 2, grad_address=self.grad.data_ptr(),
                segments=[(0, self.n, hyper_of(self.rule, self.steps_done))],
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


def moved(engine: _C.Engine) -> tuple[int, int]:
    counters = engine.counters()
    return counters["read_bytes"], counters["written_bytes"]


def fio_floor_s(
    work: OutOfCore, read_nbytes: int, written_nbytes: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Seconds fio needs for as many bytes: mixed in that proportion, or reads and then writes; by block size.

    It moves them over the state's own file, since some parts of a drive are faster than others.
    """
    both = read_nbytes + written_nbytes
    nbytes = work.job_nbytes * work.n_jobs // (1 << 22) * (1 << 22)
    if not nbytes:
        raise SystemExit("fio needs 4 MiB of state to move at least: raise --storage-elements")
    passes = max(1, round(both * arguments.steps / nbytes))
    seconds = {}
    for block_nbytes in sorted({FIO_BLOCK_NBYTES, arguments.block_nbytes}):
        shape = {"nbytes": nbytes, "block_nbytes": block_nbytes, "queue_depth": arguments.queue_depth}
        mixed = fio(work.path, "rw", read_percent=round(100 * read_nbytes / both), passes=passes, **shape)
        read, write = (
            fio(work.path, mode, passes=max(1, passes // 2), **shape) for mode in ("read", "write")
        )
        blocks = f"blocks of {block_nbytes >> 10} KiB"
        seconds[f"mixed, {blocks}"] = both / mixed.bytes_per_s
        seconds[f"reads, then writes, {blocks}"] = (
            read_nbytes / read.bytes_per_s + written_nbytes / write.bytes_per_s
        )
    return seconds

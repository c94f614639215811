"""The I/O engine against fio and other io_uring users: same file, same block size, same queue depth, O_DIRECT.

Three cases over one file: sequential read, sequential write, and mixed (blocks alternate between reading and
writing, one pass). Rounds are interleaved, peers right beside ours in random order, so that a slow minute of the
drive meets everyone. fio runs with io_uring, registered buffers and a registered file, its fastest form. DeepSpeed's
`aio_handle` and the PyPI `liburing` bindings are measured too where they are installed.

`ratio` is the median over rounds of our rate over that of the best peer (the peer with the highest median rate).
GB is 10^9 bytes. CPU seconds are user + system of the whole process during the transfer.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import pathlib
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from offload.transfer.io_engine import Arena, Engine

CASES = ("sequential_read", "sequential_write", "mixed")
FIO_MODES = {"sequential_read": "read", "sequential_write": "write", "mixed": "rw"}
Sample = tuple[float, float]  # GB/s, CPU seconds per GB
Runner = Callable[[str], Sample]


def timed(one_pass: Callable[[], object], nbytes: int, passes: int) -> Sample:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    for _ in range(passes):
        one_pass()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return passes * nbytes / seconds / 1e9, cpu_s / (passes * nbytes) * 1e9


class Offload:
    """Our engine, from Python, with registered arenas."""

    def __init__(self, path: str, arguments: argparse.Namespace) -> None:
        self.block, self.nbytes, self.passes = arguments.block_nbytes, arguments.nbytes, arguments.passes
        self.window = self.block * arguments.queue_depth
        self.source, self.target = Arena(self.nbytes), Arena(self.nbytes)
        self.source_view = np.frombuffer(self.source, dtype=np.uint8)
        self.target_view = np.frombuffer(self.target, dtype=np.uint8)
        self.source_view[:] = np.random.default_rng(0).integers(0, 256, self.nbytes, dtype=np.uint8)
        self.target_view[:] = 0
        self.engine = Engine(
            [path], backend=arguments.backend, block_nbytes=self.block, queue_depth=arguments.queue_depth
        )
        registered = [self.engine.register_buffer(a.address, a.nbytes) for a in (self.source, self.target)]
        self.registered = all(registered)

    def write_all(self) -> None:
        self.engine.write(self.source.address, self.nbytes, 0).wait()

    def read_all(self) -> None:
        self.engine.read(self.target.address, self.nbytes, 0).wait()

    def alternate(self) -> None:
        tickets = []
        for i, offset in enumerate(range(0, self.nbytes, self.block)):
            length = min(self.block, self.nbytes - offset)
            if i % 2 == 0:
                tickets.append(self.engine.read(self.target.address + offset, length, offset))
            else:
                tickets.append(self.engine.write(self.source.address + offset, length, offset))
        for ticket in tickets:
            ticket.wait()

    def transfer(self, case: str) -> None:
        """One pass through queue_depth blocks of memory, the footprint of the peers; contents are not looked at."""
        tickets = []
        step = self.block if case == "mixed" else self.window
        for i, offset in enumerate(range(0, self.nbytes, step)):
            length = min(step, self.nbytes - offset)
            within = offset % self.window
            if case == "sequential_read" or (case == "mixed" and i % 2 == 0):
                tickets.append(self.engine.read(self.target.address + within, length, offset))
            else:
                tickets.append(self.engine.write(self.source.address + within, length, offset))
        for ticket in tickets:
            ticket.wait()

    def run(self, case: str) -> Sample:
        return timed(lambda: self.transfer(case), self.nbytes, self.passes)

    def verify(self) -> None:
        """Writes, mixes and reads once more, untimed, and compares every byte."""
        for view, transfer in ((self.target_view, self.alternate), (self.target_view, self.read_all)):
            self.write_all()
            view[:] = 0
            transfer()
            for i, offset in enumerate(range(0, self.nbytes, self.block)):
                part = slice(offset, offset + self.block)
                was_read = transfer == self.read_all or i % 2 == 0
                if was_read and not np.array_equal(view[part], self.source_view[part]):
                    raise SystemExit(f"wrong bytes came back at offset {offset}")


class Fio:
    def __init__(self, path: str, arguments: argparse.Namespace) -> None:
        if shutil.which("fio") is None:
            raise SystemExit("fio is not installed: run `apt-get install fio`")
        self.command = [
            *("fio", "--name=peer", f"--filename={path}", f"--size={arguments.nbytes}", "--overwrite=1"),
            *(f"--bs={arguments.block_nbytes}", f"--iodepth={arguments.queue_depth}", "--ioengine=io_uring"),
            *("--direct=1", "--fixedbufs=1", "--registerfiles=1", "--scramble_buffers=0", "--gtod_reduce=1"),
            *(f"--loops={arguments.passes}", "--output-format=json"),
        ]

    def run(self, case: str) -> Sample:
        command = [*self.command, f"--rw={FIO_MODES[case]}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"fio failed: {result.stderr.strip()}")
        job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
        nbytes = job["read"]["io_bytes"] + job["write"]["io_bytes"]
        seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
        cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
        return nbytes / seconds / 1e9, cpu_s / nbytes * 1e9


class PythonLiburing:
    """The PyPI `liburing` bindings, driven from a plain Python loop at the same depth."""

    def __init__(self, path: str, arguments: argparse.Namespace) -> None:
        import liburing  # type: ignore[import-not-found, unused-ignore]

        self.api = liburing
        self.block, self.nbytes, self.depth = arguments.block_nbytes, arguments.nbytes, arguments.queue_depth
        self.passes = arguments.passes
        self.descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.buffer = mmap.mmap(-1, self.depth * self.block)
        view = memoryview(self.buffer)
        # Vectors, because only they take memory that is aligned for O_DIRECT; kept, because the kernel reads them.
        self.vectors = [
            liburing.Iovec([view[i * self.block : (i + 1) * self.block]]) for i in range(self.depth)
        ]

    def transfer(self, case: str) -> None:
        api, ring, cqe = self.api, self.api.Ring(), self.api.Cqe()
        api.io_uring_queue_init(self.depth, ring)
        free = list(range(self.depth))
        offset = completed = 0
        while completed < self.nbytes:
            while free and offset < self.nbytes:
                slot = free.pop()
                sqe = api.io_uring_get_sqe(ring)
                reads = case == "sequential_read" or (case == "mixed" and offset // self.block % 2 == 0)
                prepare = api.io_uring_prep_readv if reads else api.io_uring_prep_writev
                prepare(sqe, self.descriptor, self.vectors[slot], offset)
                api.io_uring_sqe_set_data64(sqe, slot + 1)
                offset += self.block
            api.io_uring_submit_and_wait(ring, 1)
            while len(free) < self.depth and api.io_uring_cq_ready(ring):
                api.io_uring_wait_cqe(ring, cqe)
                if cqe[0].res != self.block:
                    raise OSError(f"a transfer returned {cqe[0].res}")
                free.append(cqe[0].user_data - 1)
                completed += self.block
                api.io_uring_cq_advance(ring, 1)
        api.io_uring_queue_exit(ring)

    def run(self, case: str) -> Sample:
        return timed(lambda: self.transfer(case), self.nbytes, self.passes)


class DeepSpeedAio:
    """DeepSpeed's libaio handle with two threads; it has no call for mixed transfers."""

    def __init__(self, path: str, arguments: argparse.Namespace) -> None:
        import torch
        from deepspeed.ops.op_builder import (  # type: ignore[import-not-found, unused-ignore]
            AsyncIOBuilder,
        )

        module = AsyncIOBuilder().load(verbose=False)
        self.path, self.nbytes, self.passes = path, arguments.nbytes, arguments.passes
        # block size, queue depth, single submit, overlap events, threads
        self.handle = module.aio_handle(arguments.block_nbytes, arguments.queue_depth, False, True, 2)
        self.tensor = self.handle.new_cpu_locked_tensor(self.nbytes, torch.empty(0, dtype=torch.uint8))
        self.tensor.zero_()

    def run(self, case: str) -> Sample:
        if case == "mixed":
            raise NotImplementedError
        transfer = self.handle.sync_pread if case == "sequential_read" else self.handle.sync_pwrite
        return timed(lambda: transfer(self.tensor, self.path, 0), self.nbytes, self.passes)


def make_peers(path: str, arguments: argparse.Namespace) -> dict[str, Runner]:
    peers: dict[str, Runner] = {"fio": Fio(path, arguments).run}
    for name, kind in (("liburing", PythonLiburing), ("deepspeed", DeepSpeedAio)):
        try:
            runner: Runner = kind(path, arguments).run
            runner("sequential_read")
            runner("sequential_write")
            peers[name] = runner
        except Exception as error:
            print(f"peer {name} is not measured: {type(error).__name__}: {error}"[:200], file=sys.stderr)
    return peers


def measure(case: str, runners: dict[str, Runner], rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in runners}
    shuffler = random.Random(0)
    for round_index in range(rounds + 1):
        order = list(runners)
        shuffler.shuffle(order)
        for name in order:
            if name not in samples:
                continue
            try:
                sample = runners[name](case)
            except NotImplementedError:
                del samples[name]
                continue
            if round_index > 0:  # the first round warms the file, the drive and the processes
                samples[name].append(sample)
    return samples


def row(case: str, samples: dict[str, list[Sample]]) -> dict[str, object]:
    rate = {name: statistics.median(s[0] for s in runs) for name, runs in samples.items()}
    cpu = {name: statistics.median(s[1] for s in runs) for name, runs in samples.items()}
    best = max((name for name in rate if name != "offload"), key=lambda name: rate[name])
    ratios = [ours[0] / peer[0] for ours, peer in zip(samples["offload"], samples[best], strict=True)]
    return {
        "name": case,
        "ratio": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "gb_per_s": round(rate["offload"], 3),
        "gb_per_s_min": round(min(s[0] for s in samples["offload"]), 3),
        "gb_per_s_max": round(max(s[0] for s in samples["offload"]), 3),
        "peer": best,
        "peer_gb_per_s": round(rate[best], 3),
        "peer_gb_per_s_min": round(min(s[0] for s in samples[best]), 3),
        "peer_gb_per_s_max": round(max(s[0] for s in samples[best]), 3),
        "cpu_s_per_gb": round(cpu["offload"], 5),
        "fio_cpu_s_per_gb": round(cpu["fio"], 5),
        "cpu_ratio": round(cpu["offload"] / cpu["fio"], 3) if cpu["fio"] > 0 else None,
        "all_gb_per_s": {name: round(value, 3) for name, value in rate.items()},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default=".", help="where the file is made: on the drive to measure")
    parser.add_argument("--nbytes", type=int, default=1 << 30, help="size of the file; deleted afterwards")
    parser.add_argument("--block-nbytes", type=int, default=1 << 20)
    parser.add_argument("--queue-depth", type=int, default=32)
    parser.add_argument(
        "--passes", type=int, default=4, help="over the file, per sample: amortises fio's start"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="auto", choices=["auto", "uring", "posix"])
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    if arguments.nbytes % arguments.block_nbytes or arguments.block_nbytes % 4096 or arguments.rounds < 1:
        parser.error("--nbytes is a multiple of --block-nbytes, --block-nbytes of 4096, --rounds at least 1")
    return arguments


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="offload-bench-", dir=arguments.directory) as directory:
        path = str(pathlib.Path(directory, "file"))
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, arguments.nbytes)
        ours = Offload(path, arguments)
        ours.write_all()
        runners = {"offload": ours.run, **make_peers(path, arguments)}
        rows = []
        for case in CASES:
            rows.append(row(case, measure(case, runners, arguments.rounds)))
            print(
                "{name:17} {gb_per_s:6.2f} GB/s ({gb_per_s_min:.2f} to {gb_per_s_max:.2f}), {peer} {peer_gb_per_s:.2f} "
                "({peer_gb_per_s_min:.2f} to {peer_gb_per_s_max:.2f}), ratio {ratio:.3f} ({ratio_min:.2f} to "
                "{ratio_max:.2f}); CPU s/GB {cpu_s_per_gb:.4f}, fio {fio_cpu_s_per_gb:.4f}".format(
                    **rows[-1]
                ),
                flush=True,
            )
        ours.verify()
        backend, registered = ours.engine.backend, ours.registered
        ours.engine.close()
    print(
        f"backend {backend}, registered buffers: {registered}, direct: {ours.engine.direct}; contents verified"
    )
    if arguments.json:
        report = {
            "command": " ".join(sys.argv),
            "backend": backend,
            "registered": registered,
            "rounds": arguments.rounds,
            "rows": rows,
        }
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

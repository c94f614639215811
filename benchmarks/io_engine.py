"""The I/O engine against fio and other users of asynchronous I/O: same file, block size and queue depth, O_DIRECT.

Three cases over one file: sequential read, sequential write, and mixed: reads and writes in turn, each sequential from
the start of the file, half a file each, which is what fio's `rw` does. Rounds are interleaved, all sides in random
order, so that a slow minute of the drive meets everyone. Peers:

* `fio`: io_uring, registered buffers and file, buffers on huge pages (see common.py); `fio_small_pages`: the same
  without huge pages, which is what fio does unasked.
* `deepspeed`: its `aio_handle` with two threads; `liburing`: the PyPI bindings in a plain Python loop, on huge pages.
  Both where they are installed; the aio_handle has no mixed transfers.

`ratio` is the median over rounds of our rate over that of the best peer (the peer with the highest median rate).
GB is 10^9 bytes. CPU seconds are user + system of the whole process during the transfer.
"""

from __future__ import annotations

import argparse
import mmap
import os
import pathlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from common import Transfer, about, command_line, fio, median, need_fio, spread, write_rows

from offload._C import Arena, Engine

CASES = ("sequential_read", "sequential_write", "mixed")
FIO_MODES = {"sequential_read": "read", "sequential_write": "write", "mixed": "rw"}
Runner = Callable[[str], Transfer]


def timed(one_pass: Callable[[], object], nbytes: int, passes: int) -> Transfer:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    for _ in range(passes):
        one_pass()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return Transfer(passes * nbytes, seconds, cpu_s)


def file_offset(case: str, position: int, block: int) -> int:
    """Where in the file the block at `position` of a pass goes: in the mixed case two passes run side by side."""
    return position // (2 * block) * block if case == "mixed" else position


class Offload:
    """Our engine, from Python, with registered arenas."""

    def __init__(self, path: str, arguments: argparse.Namespace) -> None:
        self.block, self.nbytes, self.passes = arguments.block_nbytes, arguments.nbytes, arguments.passes
        self.window = self.block * arguments.queue_depth
        self.group = self.block * max(
            1, arguments.queue_depth // 8
        )  # one request of the mixed case, several blocks
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
        step = self.group if case == "mixed" else self.window
        for i, position in enumerate(range(0, self.nbytes, step)):
            length = min(step, self.nbytes - position)
            within = position % self.window
            offset = file_offset(case, position, step)
            if case == "sequential_read" or (case == "mixed" and i % 2 == 0):
                tickets.append(self.engine.read(self.target.address + within, length, offset))
            else:
                tickets.append(self.engine.write(self.source.address + within, length, offset))
        for ticket in tickets:
            ticket.wait()

    def run(self, case: str) -> Transfer:
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
    """fio as a process of its own; its start is not counted."""

    def __init__(self, path: str, arguments: argparse.Namespace, huge_pages: bool) -> None:
        self.path, self.arguments, self.huge_pages = path, arguments, huge_pages

    def run(self, case: str) -> Transfer:
        return fio(
            self.path,
            FIO_MODES[case],
            nbytes=self.arguments.nbytes,
            block_nbytes=self.arguments.block_nbytes,
            queue_depth=self.arguments.queue_depth,
            passes=self.arguments.passes,
            huge_pages=self.huge_pages,
        )


class PythonLiburing:
    """The PyPI `liburing` bindings, driven from a plain Python loop at the same depth."""

    def __init__(self, path: str, arguments: argparse.Namespace) -> None:
        import liburing  # type: ignore[import-not-found, unused-ignore]

        self.api = liburing
        self.block, self.nbytes, self.depth = arguments.block_nbytes, arguments.nbytes, arguments.queue_depth
        self.passes = arguments.passes
        self.descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.buffer = mmap.mmap(-1, self.depth * self.block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.buffer.madvise(mmap.MADV_HUGEPAGE)
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
                prepare(sqe, self.descriptor, self.vectors[slot], file_offset(case, offset, self.block))
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

    def run(self, case: str) -> Transfer:
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

    def run(self, case: str) -> Transfer:
        transfer = self.handle.sync_pread if case == "sequential_read" else self.handle.sync_pwrite
        return timed(lambda: transfer(self.tensor, self.path, 0), self.nbytes, self.passes)


def make_peers(path: str, arguments: argparse.Namespace) -> dict[str, Runner]:
    peers: dict[str, Runner] = {
        "fio": Fio(path, arguments, huge_pages=True).run,
        "fio_small_pages": Fio(path, arguments, huge_pages=False).run,
    }
    for name, kind in (("liburing", PythonLiburing), ("deepspeed", DeepSpeedAio)):
        try:
            runner: Runner = kind(path, arguments).run
            runner("sequential_read")
            runner("sequential_write")
            peers[name] = runner
        except Exception as error:
            print(f"peer {name} is not measured: {type(error).__name__}: {error}"[:200], file=sys.stderr)
    return peers


def measure(case: str, runners: dict[str, Runner], rounds: int) -> dict[str, list[Transfer]]:
    sides = [name for name in runners if (name, case) != ("deepspeed", "mixed")]
    samples: dict[str, list[Transfer]] = {name: [] for name in sides}
    shuffler = random.Random(0)
    for round_index in range(rounds + 1):
        shuffler.shuffle(sides)
        for name in sides:
            sample = runners[name](case)
            if round_index > 0:  # the first round warms the file, the drive and the processes
                samples[name].append(sample)
    return samples


def row(case: str, samples: dict[str, list[Transfer]]) -> dict[str, object]:
    rate = {name: median([s.bytes_per_s / 1e9 for s in runs]) for name, runs in samples.items()}
    cpu = {name: median([s.cpu_s_per_gb for s in runs]) for name, runs in samples.items()}
    peers = {name: round(gb_per_s, 3) for name, gb_per_s in rate.items() if name != "offload"}
    best = max(peers, key=lambda name: rate[name])
    pairs = list(zip(samples["offload"], samples[best], strict=True))
    ratios = [ours.bytes_per_s / peer.bytes_per_s for ours, peer in pairs]
    return {
        "name": case,
        "ratio": round(median(ratios), 4),
        "ratio_spread": spread(ratios),
        "gb_per_s": round(rate["offload"], 3),
        "gb_per_s_spread": spread([s.bytes_per_s / 1e9 for s in samples["offload"]]),
        "peer": best,
        "peer_gb_per_s": peers[best],
        "peer_gb_per_s_spread": spread([s.bytes_per_s / 1e9 for s in samples[best]]),
        "peers_gb_per_s": peers,
        "cpu_s_per_gb": round(cpu["offload"], 5),
        "cpu_s_per_gb_spread": spread([s.cpu_s_per_gb for s in samples["offload"]], 5),
        "fio_cpu_s_per_gb": round(cpu["fio"], 5),
        "fio_cpu_s_per_gb_spread": spread([s.cpu_s_per_gb for s in samples["fio"]], 5),
        "cpu_ratio": round(cpu["offload"] / cpu["fio"], 3) if cpu["fio"] > 0 else None,
        "peers_cpu_s_per_gb": {name: round(cpu[name], 5) for name in peers},
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
    need_fio()
    with tempfile.TemporaryDirectory(prefix="offload-bench-", dir=arguments.directory) as directory:
        path = str(pathlib.Path(directory, "file"))
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, arguments.nbytes)
        ours = Offload(path, arguments)
        ours.write_all()
        runners = {"offload": ours.run, **make_peers(path, arguments)}
        facts = about(directory, backend=ours.engine.backend, direct=ours.engine.direct)
        facts |= {"registered": ours.registered, "rounds": arguments.rounds}
        facts |= {"block_nbytes": arguments.block_nbytes, "queue_depth": arguments.queue_depth}
        rows = []
        for case in CASES:
            rows.append(row(case, measure(case, runners, arguments.rounds)) | facts)
            print(
                "{name:17} {gb_per_s:6.2f} GB/s {gb_per_s_spread}, {peer} {peer_gb_per_s:.2f} {peer_gb_per_s_spread}, "
                "ratio {ratio:.3f} {ratio_spread}; CPU s/GB {cpu_s_per_gb:.4f}, fio {fio_cpu_s_per_gb:.4f}".format(
                    **rows[-1]
                ),
                flush=True,
            )
        ours.verify()
        ours.engine.close()
    for each in rows:
        each["contents_verified"] = True
    write_rows(arguments.json, rows, command_line(sys.argv[0], sys.argv[1:]))


if __name__ == "__main__":
    main()

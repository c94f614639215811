"""Touch host memory once, so that what is measured later does not pay for it.

The memory of a virtual machine is often given to it page by page, as it is first written: 0.43 GB/s were seen where
3 to 6 GB/s came later. Processes write at the same time, each its part, and hold it until all are done, so that no
page is written twice and another not at all. Then they end, and the memory is the system's again. It is done once from
one start of the machine to the next. Needs nothing but Python.

    python3 benchmarks/gpu_touch.py --gb 90 --share 0.7
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import multiprocessing
import multiprocessing.connection
import pathlib
import threading
import time
from typing import Any

PIECE_NBYTES = 64 << 20
DIE_WITH_PARENT, KILL = 1, 9
"""Of prctl (PR_SET_PDEATHSIG) and the signal."""


def available_nbytes() -> int:
    """What the kernel says can be had without swapping."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024


def touch(nbytes: int, end_s: float, done: Any, all_done: Any) -> None:
    """Write `nbytes`, add to `done` what was written by `end_s`, and wait for the others."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, KILL)
    memory = mmap.mmap(-1, nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for start in range(0, nbytes, PIECE_NBYTES):
        if time.monotonic() > end_s:
            break
        length = min(PIECE_NBYTES, nbytes - start)
        ctypes.memset(address + start, 1, length)
        with done.get_lock():
            done.value += length
    with contextlib.suppress(threading.BrokenBarrierError):
        all_done.wait()


def main() -> None:
    """All of it, and how fast it went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=90.0, help="at most")
    parser.add_argument("--share", type=float, default=0.7, help="of what is available, at most")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0, help="no further piece after so long")
    parser.add_argument(
        "--once", default="/dev/shm/offload-memory-touched", help="file that says that it was done"
    )
    options = parser.parse_args()
    mark = pathlib.Path(options.once)
    if mark.exists():
        print("memory was touched already")
        return
    nbytes = int(min(options.gb * 1e9, options.share * available_nbytes()))
    part_nbytes = max(mmap.PAGESIZE, nbytes // options.processes // mmap.PAGESIZE * mmap.PAGESIZE)
    context = multiprocessing.get_context("fork")
    done, all_done = context.Value("q", 0), context.Barrier(options.processes)
    begin_s = time.monotonic()
    workers = [
        context.Process(
            target=touch, args=(part_nbytes, begin_s + options.seconds, done, all_done), daemon=True
        )
        for _ in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    alive = workers
    while alive:
        multiprocessing.connection.wait([worker.sentinel for worker in alive])
        if any(worker.exitcode for worker in alive):  # killed for memory, say: the others would wait for it
            all_done.abort()
        alive = [worker for worker in alive if worker.exitcode is None]
    seconds = time.monotonic() - begin_s
    print(
        f"touched {done.value / 1e9:.1f} GB of host memory in {seconds:.1f} s, {done.value / seconds / 1e9:.2f} GB/s"
    )
    mark.touch()


if __name__ == "__main__":
    main()

"""Touch host memory once, so that what is measured later does not pay for it.

The memory of a virtual machine is often given to it page by page, as it is first written: 0.43 GB/s were seen where
3 to 6 GB/s came later. Some begin with a small part of their memory, and more is added as that is used: `--gb` is what
the machine is said to have, whatever the kernel says at first. Processes write at the same time, each its part, and
hold it until all are done, so that no page is written twice and another not at all. Where little is left they wait for
more, and stop when none comes. Then they end, and the memory is the system's again. It is done once from one start of
the machine to the next. Needs nothing but Python.

    python3 benchmarks/gpu_touch.py --gb 90 --share 0.85
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
from collections.abc import Callable
from typing import Any

PIECE_NBYTES = 64 << 20
NO_RESERVE = 0x4000
"""Of mmap: more may be mapped than there is at first."""
DIE_WITH_PARENT, KILL = 1, 9
"""Of prctl (PR_SET_PDEATHSIG) and the signal."""
LOOK_AGAIN_S = 0.1


def memory_nbytes() -> tuple[int, int]:
    """What the kernel says there is, and can be had without swapping."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    found = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return found["MemTotal:"], found["MemAvailable:"]


def comes_in(
    wanted_nbytes: int, share: float, patience_s: float, end_s: float, memory: Callable[[], tuple[int, int]]
) -> bool:
    """Whether so much may be taken of `memory` and leave all but `share` of it: now, or within `patience_s` of its last
    growth."""
    total_nbytes, last_growth_s = 0, time.monotonic()
    while (now_s := time.monotonic()) <= end_s:
        total_now_nbytes, available_nbytes = memory()
        if available_nbytes - wanted_nbytes >= (1 - share) * total_now_nbytes:
            return True
        if total_now_nbytes > total_nbytes:
            total_nbytes, last_growth_s = total_now_nbytes, now_s
        if now_s - last_growth_s > patience_s:
            return False
        time.sleep(LOOK_AGAIN_S)
    return False


def touch(nbytes: int, options: argparse.Namespace, end_s: float, done: Any, all_done: Any) -> None:
    """Write `nbytes` as far as they come by `end_s`, add to `done` what was written, and wait for the others."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, KILL)
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")  # rather this than what else runs here
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)  # as the library's arenas do
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for start in range(0, nbytes, PIECE_NBYTES):
        length = min(PIECE_NBYTES, nbytes - start)
        if not comes_in(options.processes * length, options.share, options.patience, end_s, memory_nbytes):
            break
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
    parser.add_argument(
        "--share", type=float, default=0.85, help="of all memory, used by others too, at most"
    )
    parser.add_argument(
        "--patience", type=float, default=4.0, help="seconds without growth after which none comes"
    )
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
    part_nbytes = max(1, int(options.gb * 1e9) // options.processes // mmap.PAGESIZE) * mmap.PAGESIZE
    context = multiprocessing.get_context("fork")
    done, all_done = context.Value("q", 0), context.Barrier(options.processes)
    begin_s = time.monotonic()
    workers = [
        context.Process(
            target=touch,
            args=(part_nbytes, options, begin_s + options.seconds, done, all_done),
            daemon=True,
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
        f"touched {done.value / 1e9:.1f} GB of host memory in {seconds:.1f} s, {done.value / seconds / 1e9:.2f} GB/s; "
        f"the system has {memory_nbytes()[0] / 1e9:.1f} GB"
    )
    mark.touch()


if __name__ == "__main__":
    main()

"""Making the pages of memory present before something takes them one by one."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

PIECE_NBYTES = 64 << 20
_POPULATE_WRITE = 23
"""Of madvise, in Linux from 5.14 on."""
_THREADS_MAX = 8


def make_present(address: int, nbytes: int) -> None:
    """Make whole pages of private memory present, by several threads. What is in them stays.

    A driver that locks pages brings in one after the other, and writing zeros is most of its time. Does nothing where
    the kernel cannot, and nothing for a piece that one thread brings in as fast.
    """
    if nbytes <= PIECE_NBYTES:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    end = address + nbytes

    def bring_in(start: int) -> None:
        madvise(
            start, min(PIECE_NBYTES, end - start), _POPULATE_WRITE
        )  # a hint: whoever is refused sees it later

    n_threads = min(_THREADS_MAX, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(n_threads, thread_name_prefix="offload-pages") as pool:
        for _ in pool.map(bring_in, range(address, end, PIECE_NBYTES)):
            pass

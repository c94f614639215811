"""How fast the storage directories are, by a short transfer with the engine that the run uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from offload._C import Ticket
from offload.tiers.host import HostArena
from offload.tiers.storage import Store

BLOCK_NBYTES = 1 << 20
BLOCKS_IN_FLIGHT_PER_DRIVE = 16


def _pass(
    transfer: Callable[[int], Ticket], n_blocks: int, in_flight: int, seconds_max: float
) -> tuple[int, float]:
    """Move blocks 0, 1, ... until `n_blocks` or `seconds_max` are reached: how many, and bytes a second."""
    tickets: list[Ticket] = []
    start_s = time.perf_counter()
    n_moved = 0
    while n_moved < n_blocks and time.perf_counter() - start_s < seconds_max:
        if len(tickets) == in_flight:
            tickets.pop(0).wait()
        tickets.append(transfer(n_moved))
        n_moved += 1
    for ticket in tickets:
        ticket.wait()
    return n_moved, n_moved * BLOCK_NBYTES / max(1e-9, time.perf_counter() - start_s)


def measure_rates(
    directories: Sequence[str],
    *,
    backend: str = "auto",
    direct: bool = True,
    queue_depth: int = 32,
    nbytes_per_drive: int = 64 << 20,
    seconds_max: float = 0.5,
) -> tuple[float, float]:
    """Bytes a second (read, written) of all `directories` together, striped over them as the run's store is.

    A scratch store of `nbytes_per_drive` a directory is written twice (the first pass also gives its blocks to the
    file; the faster one counts), then read, then removed. Each pass ends after `seconds_max` seconds and the blocks in
    flight. Takes 1 MiB of memory. Raises StoreError or OSError as a store does.
    """
    n_blocks = max(1, nbytes_per_drive // BLOCK_NBYTES) * len(directories)
    in_flight = BLOCKS_IN_FLIGHT_PER_DRIVE * len(directories)
    store = Store(
        directories,
        n_blocks * BLOCK_NBYTES,
        stripe_nbytes=BLOCK_NBYTES,
        backend=backend,
        direct=direct,
        block_nbytes=BLOCK_NBYTES,
        queue_depth=queue_depth,
        keep=False,
    )
    try:
        arena = HostArena(BLOCK_NBYTES)
        arena.bytes_tensor.random_(0, 256)  # drives that compress are not to look faster
        engine = store.engine
        n_written, first = _pass(
            lambda block: engine.write(arena.address, BLOCK_NBYTES, block * BLOCK_NBYTES),
            n_blocks, in_flight, seconds_max,
        )  # fmt: skip
        _, second = _pass(
            lambda block: engine.write(arena.address, BLOCK_NBYTES, block * BLOCK_NBYTES),
            n_written, in_flight, seconds_max,
        )  # fmt: skip
        _, read = _pass(
            lambda block: engine.read(arena.address, BLOCK_NBYTES, block * BLOCK_NBYTES),
            n_written, in_flight, seconds_max,
        )  # fmt: skip
        return read, max(first, second)
    finally:
        store.close()

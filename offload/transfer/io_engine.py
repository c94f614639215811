"""Typed face of the I/O engine and the update pipeline in `offload._C`."""

from __future__ import annotations

from collections.abc import Sequence

from offload._C import Arena, Engine, Hyper, Ticket, UpdateJob, UpdatePipeline, simd_levels, split_master

__all__ = [
    "Arena",
    "Engine",
    "Hyper",
    "Ticket",
    "UpdateJob",
    "UpdatePipeline",
    "io_engine",
    "simd_levels",
    "split_master",
]


def io_engine(
    paths: Sequence[str],
    *,
    backend: str = "auto",
    direct: bool = True,
    block_nbytes: int = 1 << 20,
    queue_depth: int = 32,
    stripe_nbytes: int = 1 << 20,
) -> Engine:
    """An engine over existing files, striped by `stripe_nbytes` when there are several.

    Raises OSError naming the file that cannot be opened, ValueError for sizes that are not multiples of 4096.
    """
    return Engine(
        list(paths),
        backend=backend,
        direct=direct,
        block_nbytes=block_nbytes,
        queue_depth=queue_depth,
        stripe_nbytes=stripe_nbytes,
    )

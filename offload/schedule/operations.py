"""Everything a step does, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Lane = Literal["compute", "h2d", "d2h", "read", "write", "cpu"]
"""A resource that works off its operations one at a time: the device, each direction of the bus, reads and writes of
the drives, the update threads."""
LANES: tuple[Lane, ...] = ("compute", "h2d", "d2h", "read", "write", "cpu")

Kind = Literal[
    "fetch",  # read: parameters from storage into host memory (into the slot, where the device tier is DRAM)
    "load",  # h2d: parameters into a slot
    "forward",
    "recompute",
    "backward",
    "swap_out",  # d2h: activations leave the device
    "spill",  # write: activations or waiting gradients go on from host memory to storage
    "read_back",  # read: activations or waiting gradients come from storage
    "swap_in",  # h2d: activations return
    "grad_out",  # d2h: a block's gradients
    "state_in",  # read: optimizer state
    "update",  # cpu: AdamW; compute: of what stays on the device
    "state_out",  # write: optimizer state and parameters
]


@dataclass(frozen=True)
class Operation:
    """One thing a step does on one lane. `amount` is FLOPs (compute), bytes (h2d, d2h, read, write) or parameters
    (cpu). It starts when all of `after` (indices into the list, all smaller than its own) have ended, its lane is free
    and its memory is to be had; among ready operations of a lane those of the lowest `rank` go first, and of these the
    first of the list."""

    kind: Kind
    lane: Lane
    name: str
    amount: float
    after: tuple[int, ...] = ()
    dram_nbytes: float = 0.0
    """Traffic through DRAM, shared with everything else that runs."""
    whole_flops: float = 0.0
    """Recompute: FLOPs of the whole forward, of which `amount` are made again; its other work is done in any case."""
    fixed_s: float = 0.0
    """Time it takes beside its amount."""
    acquires: tuple[tuple[str, int], ...] = ()
    """(tier, bytes) held from its start."""
    releases: tuple[tuple[str, int], ...] = ()
    """(tier, bytes) given back at its end."""
    step: int = 0
    block: int | None = None
    """None: the root."""
    micro_batch: int | None = None
    rank: int = 0
    """Updates have one: they make way for what computing needs, and for updates that forward needs earlier."""

"""Which saved tensors are worth their bytes: candidates from "recompute all" to "save all", and where saved ones go.

A unit is one saved tensor of one block. Saving it costs its bytes and saves the FLOPs that recompute it (Ratel's
offloading benefit, FLOPs per byte). The best sets of units by bytes are found exactly, by dynamic programming over
classes of equal units, where sizes have a common divisor that is not too small, and to one part in 4096 otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from offload.planner.plan import INPUT
from offload.planner.workload import Workload

LEVELS_MAX = 4096
CANDIDATES_MAX = 64


@dataclass(frozen=True)
class UnitClass:
    """Units of equal size and benefit, in the order in which they are chosen."""

    nbytes: int
    flops: float
    members: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Candidates:
    """`counts[c, k]`: how many units of class k candidate c saves. Quantities per sample, growing with c."""

    classes: tuple[UnitClass, ...]
    counts: npt.NDArray[np.int64]
    saved_nbytes: npt.NDArray[np.float64]
    recompute_flops: npt.NDArray[np.float64]

    def members(self, candidate: int) -> set[tuple[int, str]]:
        """The saved units of a candidate."""
        chosen: set[tuple[int, str]] = set()
        for unit_class, count in zip(self.classes, self.counts[candidate], strict=True):
            chosen.update(unit_class.members[: int(count)])
        return chosen


def spread(n_all: int, n_chosen: int) -> list[int]:
    """`n_chosen` of `range(n_all)`, evenly spaced."""
    return [i for i in range(n_all) if (i + 1) * n_chosen // n_all > i * n_chosen // n_all]


def spread_order(n_all: int) -> list[int]:
    """An order of `range(n_all)` whose every prefix is spread over it (bit-reversed positions)."""
    n_bits = max(1, (n_all - 1).bit_length())
    order = sorted(range(1 << n_bits), key=lambda i: int(f"{i:0{n_bits}b}"[::-1], 2))
    return [i for i in order if i < n_all]


def unit_classes(workload: Workload) -> tuple[UnitClass, ...]:
    """All units, most FLOPs saved per byte first."""
    found: dict[tuple[int, float, str], list[tuple[int, str]]] = {}
    for index, block in enumerate(workload.blocks):
        for tensor in block.saved:
            key = (tensor.nbytes_per_sample, tensor.recompute_flops_per_sample, tensor.name)
            found.setdefault(key, []).append((index, tensor.name))
    classes = [
        UnitClass(n, f, tuple(members[i] for i in spread_order(len(members))))
        for (n, f, _), members in found.items()
    ]
    return tuple(sorted(classes, key=lambda c: (-c.flops / max(1, c.nbytes), c.nbytes)))


def everything(workload: Workload) -> Candidates:
    """The one set that saves every unit, those that cost no FLOPs to recompute among them."""
    classes = unit_classes(workload)
    return _measured(classes, np.array([[len(c.members) for c in classes]], dtype=np.int64))


def candidates(workload: Workload) -> Candidates:
    """Sets of saved units, each the most FLOPs that its bytes can save."""
    classes = unit_classes(workload)
    total = sum(c.nbytes * len(c.members) for c in classes)
    if total == 0:
        counts = np.array([[len(c.members) for c in classes]], dtype=np.int64)
        return _measured(classes, counts)
    quantum = 0
    for unit_class in classes:
        quantum = gcd(quantum, unit_class.nbytes)
    if total // quantum > LEVELS_MAX:
        quantum = -(-total // LEVELS_MAX)
    widths = [-(-c.nbytes // quantum) for c in classes]
    n_levels = sum(w * len(c.members) for w, c in zip(widths, classes, strict=True)) + 1
    best = np.zeros(n_levels)
    taken = np.zeros((len(classes), n_levels), dtype=np.int64)
    for k, (unit_class, width) in enumerate(zip(classes, widths, strict=True)):
        if unit_class.flops <= 0 and unit_class.nbytes > 0:
            continue
        before = best.copy()
        for count in range(1, len(unit_class.members) + 1):
            shift = count * width
            gain = before[: n_levels - shift] + count * unit_class.flops
            better = gain > best[shift:]
            best[shift:][better] = gain[better]
            taken[k, shift:][better] = count
    rises = np.flatnonzero(np.concatenate(([True], best[1:] > np.maximum.accumulate(best)[:-1])))
    rows = []
    for level in _thinned(rises, widths, classes):
        row = np.zeros(len(classes), dtype=np.int64)
        left = int(level)
        for k in reversed(range(len(classes))):
            row[k] = taken[k, left]
            left -= int(row[k]) * widths[k]
        rows.append(row)
    return _measured(classes, np.array(rows))


def _thinned(
    rises: npt.NDArray[np.int64], widths: list[int], classes: tuple[UnitClass, ...]
) -> npt.NDArray[np.int64]:
    """At most about CANDIDATES_MAX levels: evenly spaced ones, and the ends of whole classes (the convex corners)."""
    if len(rises) <= CANDIDATES_MAX:
        return rises
    corners = np.cumsum([w * len(c.members) for w, c in zip(widths, classes, strict=True)])
    picked = rises[np.linspace(0, len(rises) - 1, CANDIDATES_MAX).astype(np.int64)]
    return np.union1d(picked, np.intersect1d(rises, corners))


def _measured(classes: tuple[UnitClass, ...], counts: npt.NDArray[np.int64]) -> Candidates:
    nbytes = np.array([c.nbytes for c in classes], dtype=np.float64)
    flops = np.array([c.flops for c in classes], dtype=np.float64)
    all_flops = float(sum(c.flops * len(c.members) for c in classes))
    if not classes:
        return Candidates(classes, counts.reshape(1, 0), np.zeros(1), np.zeros(1))
    return Candidates(classes, counts, counts @ nbytes, np.maximum(0.0, all_flops - counts @ flops))


def unit_order(workload: Workload) -> list[tuple[int, str, int]]:
    """(block, tensor, bytes a sample) in the order in which saved units are kept on the device: evenly spread over the
    blocks, so that what is left to swap is spread too; in each block its input first."""
    order = []
    for index in spread_order(len(workload.blocks)):
        block = workload.blocks[index]
        order.append((index, INPUT, block.input_nbytes_per_sample))
        order += [(index, t.name, t.nbytes_per_sample) for t in block.saved]
    return order

"""Runs a list of operations in simulated time: lanes, shared bandwidth, memory limits.

[Note: the fluid model] Each lane runs one operation at a time. What runs together may share something: reads and
writes the drives' time, the two directions the bus, everything that touches DRAM its bandwidth, and, where the
device tier is DRAM, computing and updating the cores. Between two events every speed is constant, so the next
event is the earliest completion; speeds are then found anew.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offload.errors import OffloadError
from offload.planner.rates import Rates
from offload.schedule.operations import LANES, Lane, Operation
from offload.telemetry import Span

STALL_CAUSES = {
    "fetch": "fetch",
    "load": "fetch",
    "swap_out": "activation",
    "spill": "activation",
    "read_back": "activation",
    "swap_in": "activation",
    "grad_out": "gradient",
    "state_in": "update",
    "update": "update",
    "state_out": "update",
}
"""Cause under which the device's waiting for an operation of this kind is counted (the names of `telemetry.Stalls`)."""

Changes = tuple[tuple[str, int], ...]
"""Of memory: tiers and bytes."""


class SimulationError(OffloadError):
    """The list of operations cannot be worked off."""


@dataclass
class Timeline:
    """What a simulation has found. `start_s` and `end_s` are by operation."""

    start_s: list[float]
    end_s: list[float]
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By tier: (seconds, bytes held from then on)."""

    @property
    def total_s(self) -> float:
        """When the last operation ends."""
        return max(self.end_s, default=0.0)

    def peak_nbytes(self, tier: str) -> int:
        """Most bytes held at once."""
        return max((nbytes for _, nbytes in self.memory.get(tier, [])), default=0)

    def spans(self, operations: Sequence[Operation]) -> list[Span]:
        """For a trace or a picture."""
        return [
            Span(o.lane, o.name, start, end)
            for o, start, end in zip(operations, self.start_s, self.end_s, strict=True)
        ]


def work_of(operation: Operation) -> str:
    """The kind of computing, as `Hardware.work_flops_per_s` names it."""
    return operation.kind if operation.block is not None else f"root_{operation.kind}"


def duration_alone_s(operation: Operation, rates: Rates) -> float:
    """How long an operation takes when nothing else runs."""
    lane, amount = operation.lane, operation.amount
    if operation.kind == "recompute":
        beside_s = rates.seconds_beside_products("recompute", operation.whole_flops)
        return float(amount / rates.flops_per_s + beside_s + operation.fixed_s)
    if amount <= 0:
        return operation.fixed_s
    if lane in ("read", "write"):
        if rates.storage is None:
            raise SimulationError(f"{operation.name} needs storage, but the hardware profile has no drives")
        alone = amount / (rates.storage.read if lane == "read" else rates.storage.write)
    else:
        rate = {
            "compute": rates.work_flops_per_s.get(work_of(operation), rates.flops_per_s),
            "h2d": rates.bus.h2d,
            "d2h": rates.bus.d2h,
            "cpu": rates.update_params_per_s,
        }[lane]
        alone = amount / rate
    return max(alone, operation.dram_nbytes / rates.dram_bytes_per_s) + operation.fixed_s


class _Simulation:
    """State of one run."""

    def __init__(
        self,
        operations: Sequence[Operation],
        rates: Rates,
        held_nbytes: Mapping[str, int],
        limit_nbytes: Mapping[str, int],
    ) -> None:
        self.operations = operations
        self.rates = rates
        self.limits = dict(limit_nbytes)
        self.held: dict[str, int] = defaultdict(int, held_nbytes)
        self.now = 0.0
        n = len(operations)
        self.timeline = Timeline([0.0] * n, [0.0] * n)
        for tier, nbytes in held_nbytes.items():
            self.timeline.memory[tier] = [(0.0, nbytes)]
        self.missing = [0] * n
        self.followers: list[list[int]] = [[] for _ in range(n)]
        self.ready: dict[Lane, dict[Changes, list[tuple[int, int]]]] = {lane: {} for lane in LANES}
        """By lane, and by what they acquire: those that want the same memory have room or have none together."""
        self.running: dict[Lane, int] = {}
        self.left: dict[Lane, float] = {}
        self.alone_s = [duration_alone_s(o, rates) for o in operations]
        self.done = 0
        for index, operation in enumerate(operations):
            for before in operation.after:
                if not 0 <= before < index:
                    raise SimulationError(
                        f"operation {index} ({operation.name}) waits for {before}: not before it"
                    )
                self.followers[before].append(index)
            self.missing[index] = len(operation.after)
            if not operation.after:
                self._make_ready(index)

    def _make_ready(self, index: int) -> None:
        operation = self.operations[index]
        queue = self.ready[operation.lane].setdefault(operation.acquires, [])
        heapq.heappush(queue, (operation.rank, index))

    def _change(self, changes: Changes, sign: int) -> None:
        for tier, nbytes in changes:
            self.held[tier] += sign * nbytes
            self.timeline.memory.setdefault(tier, []).append((self.now, self.held[tier]))

    def _fits(self, acquires: Changes) -> bool:
        return all(
            tier not in self.limits or self.held[tier] + nbytes <= self.limits[tier]
            for tier, nbytes in acquires
        )

    def _start_what_can(self) -> None:
        for lane, queues in self.ready.items():
            if lane in self.running:
                continue
            first: list[tuple[int, int]] | None = None
            for acquires, queue in queues.items():
                if queue and (first is None or queue[0] < first[0]) and self._fits(acquires):
                    first = queue
            if first is not None:
                self._start(lane, heapq.heappop(first)[1])

    def _start(self, lane: Lane, index: int) -> None:
        self._change(self.operations[index].acquires, 1)
        self.timeline.start_s[index] = self.now
        self.running[lane] = index
        self.left[lane] = self.alone_s[index]

    def _speeds(self) -> dict[Lane, float]:
        """Speed of each running operation, 1 being as if alone. See [Note: the fluid model]."""
        rates, running = self.rates, self.running
        speeds: dict[Lane, float] = dict.fromkeys(running, 1.0)
        if "read" in running and "write" in running and rates.storage is not None:
            speeds["read"], speeds["write"] = rates.storage.mixed()
        if "h2d" in running and "d2h" in running:
            speeds["h2d"] = rates.bus.h2d_duplex / rates.bus.h2d
            speeds["d2h"] = rates.bus.d2h_duplex / rates.bus.d2h
        if rates.shares_host and "compute" in running and "cpu" in running:
            speeds["compute"], speeds["cpu"] = rates.compute_beside_update, rates.update_beside_compute
        if rates.shares_host and "compute" in running and ("read" in running or "write" in running):
            speeds["compute"] *= rates.compute_beside_storage
            for lane in speeds:
                if lane in ("read", "write"):
                    speeds[lane] *= rates.storage_beside_compute
        wanted = {
            lane: speeds[lane] * self.operations[index].dram_nbytes / self.alone_s[index]
            for lane, index in running.items()
            if self.operations[index].dram_nbytes and self.alone_s[index]
        }
        if sum(wanted.values()) < rates.dram_bytes_per_s * (1 - 1e-9):
            return speeds  # enough for all
        for lane, share in fair_shares(wanted, rates.dram_bytes_per_s).items():
            speeds[lane] *= share / wanted[lane]
        return speeds

    def _end(self, lane: Lane) -> None:
        index = self.running.pop(lane)
        self.left.pop(lane)
        self.timeline.end_s[index] = self.now
        self.done += 1
        self._change(self.operations[index].releases, -1)
        for follower in self.followers[index]:
            self.missing[follower] -= 1
            if not self.missing[follower]:
                self._make_ready(follower)

    def run(self) -> Timeline:
        """Work everything off."""
        while self.done < len(self.operations):
            self._start_what_can()
            if not self.running:
                self._refuse()
            speeds = self._speeds()
            step_s = min(self.left[lane] / speeds[lane] for lane in self.running)
            self.now += step_s
            ended = []
            for lane in self.running:
                self.left[lane] -= step_s * speeds[lane]
                if self.left[lane] <= 1e-12 * (1.0 + self.alone_s[self.running[lane]]):
                    ended.append(lane)
            for lane in ended:
                self._end(lane)
        return self.timeline

    def _refuse(self) -> None:
        heads = [[queue[0] for queue in queues.values() if queue] for queues in self.ready.values()]
        stuck = [self.operations[min(head)[1]] for head in heads if head]
        if not stuck:
            raise SimulationError("nothing is ready and nothing runs; the list of operations is inconsistent")
        first = stuck[0]
        wants = ", ".join(
            f"{nbytes} bytes of {tier} memory ({self.held[tier]} of {self.limits.get(tier, 'unlimited')} held)"
            for tier, nbytes in first.acquires
        )
        raise SimulationError(f"{first.name} can never start: it wants {wants}")


def fair_shares(wanted: Mapping[Lane, float], capacity: float) -> dict[Lane, float]:
    """Max-min fair shares of `capacity`: who wants less than an equal share gets it, the rest share what is left."""
    shares: dict[Lane, float] = {}
    left, n_left = capacity, len(wanted)
    for lane, amount in sorted(wanted.items(), key=lambda item: item[1]):
        shares[lane] = min(amount, left / n_left)
        left -= shares[lane]
        n_left -= 1
    return shares


def simulate(
    operations: Sequence[Operation],
    rates: Rates,
    *,
    held_nbytes: Mapping[str, int] | None = None,
    limit_nbytes: Mapping[str, int] | None = None,
) -> Timeline:
    """Run `operations` in simulated time. `held_nbytes` is what each tier holds throughout, `limit_nbytes` what it may
    hold: an operation that would exceed it waits. Raises SimulationError when one can never start."""
    return _Simulation(operations, rates, held_nbytes or {}, limit_nbytes or {}).run()

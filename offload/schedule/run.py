"""Simulates a plan and says what a steady step takes, what the device waits for, and what each tier holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from offload.planner.cost_model import device_update_s
from offload.planner.hardware import Hardware
from offload.planner.plan import Budgets, Plan
from offload.planner.rates import rates_of
from offload.planner.states_on_device import streamed_by
from offload.planner.workload import Workload
from offload.schedule.emitter import PIECES
from offload.schedule.held import held_nbytes
from offload.schedule.operations import Operation
from offload.schedule.simulator import STALL_CAUSES, Timeline, simulate
from offload.schedule.unroll import unroll
from offload.telemetry import Span

STAGING_NBYTES = Budgets(0, 0).staging_nbytes
TIERS = ("device", "host", "storage")
SECONDS_PER_YEAR = 365.25 * 86400


@dataclass(frozen=True)
class SimulatedStep:
    """One steady step of a plan. GB = 10^9 bytes; TFLOPS = 10^12 FLOP/s."""

    step_s: float
    tokens_per_s: float
    model_tflops: float
    """6 FLOPs a parameter and token, plus attention."""
    hardware_tflops: float
    """With recomputation."""
    stall_s: dict[str, float]
    """What the device waited for, by cause; `overhead` is the machine's fixed time of a step."""
    busy_s: dict[str, float]
    """Seconds each lane worked during the step."""
    read_nbytes: float
    written_nbytes: float
    h2d_nbytes: float
    d2h_nbytes: float
    peak_nbytes: dict[str, int]
    """By tier, over the whole simulation."""
    endurance_steps: float | None
    """Steps until the drives' endurance is used up; None where it is not known or nothing is written."""
    spans: list[Span] = field(repr=False)
    """Of the steady step and what runs beside it, from its beginning."""
    memory: dict[str, list[tuple[float, int]]] = field(repr=False)
    """By tier: (seconds, bytes held from then on), on the spans' clock."""

    @property
    def endurance_years(self) -> float | None:
        """The same when training never stops."""
        return None if self.endurance_steps is None else self.endurance_steps * self.step_s / SECONDS_PER_YEAR


def stalls(
    operations: Sequence[Operation], timeline: Timeline, start_s: float, end_s: float
) -> dict[str, float]:
    """Idle time of the device between two moments, charged to the operation that ended last before a gap closed."""
    found: dict[str, float] = defaultdict(float)
    idle_since = start_s
    order = sorted(
        (i for i, o in enumerate(operations) if o.lane == "compute"), key=lambda i: timeline.start_s[i]
    )
    for index in order:
        begin, end = timeline.start_s[index], timeline.end_s[index]
        if end <= start_s:
            continue
        if begin > idle_since and idle_since < end_s:
            causes = [a for a in operations[index].after if timeline.end_s[a] > idle_since]
            last = max(causes, key=lambda a: timeline.end_s[a], default=None)
            cause = "memory" if last is None else STALL_CAUSES.get(operations[last].kind, "memory")
            found[cause] += min(begin, end_s) - idle_since
        idle_since = max(idle_since, end)
    return dict(found)


def endurance_steps(hardware: Hardware, written_nbytes_per_step: float) -> float | None:
    """Steps until the first drive has taken all the writes its maker allows; the drives are written evenly."""
    known = [d.endurance_nbytes for d in hardware.drives if d.endurance_nbytes is not None]
    if not known or written_nbytes_per_step <= 0:
        return None
    return min(known) * len(hardware.drives) / written_nbytes_per_step


def simulate_plan(
    plan: Plan, workload: Workload, hardware: Hardware, *, staging_nbytes: int = STAGING_NBYTES
) -> SimulatedStep:
    """Unroll `plan` into three steps, run them in simulated time and report the third, which is steady."""
    workload = streamed_by(plan, workload)
    operations, ends = unroll(
        plan,
        workload,
        shares_host=hardware.shares_host,
        launch_overhead_s=hardware.launch_overhead_s,
        device_update_s=device_update_s(workload, hardware),
    )
    held = held_nbytes(
        plan,
        workload,
        shares_host=hardware.shares_host,
        staging_nbytes=staging_nbytes,
        has_storage=bool(hardware.drives),
    )
    rates = rates_of(hardware, workload.param_nbytes, workload.rule)
    timeline = simulate(operations, rates, held_nbytes=held, limit_nbytes={PIECES: plan.update_buffers})
    start_s, end_s = timeline.end_s[ends[-2]], timeline.end_s[ends[-1]]
    step_s = end_s - start_s + hardware.step_overhead_s
    moved: dict[str, float] = defaultdict(float)
    for operation in operations:
        if operation.step == 1:
            moved[operation.lane] += operation.amount
    model_flops = moved["compute"] - sum(
        o.amount for o in operations if o.step == 1 and o.kind == "recompute"
    )
    busy: dict[str, float] = defaultdict(float)
    spans = []
    for span in timeline.spans(operations):
        inside = min(span.end_s, end_s) - max(span.start_s, start_s)
        if inside > 0:
            busy[span.resource] += inside
        if span.end_s > start_s and span.end_s > span.start_s:
            spans.append(
                Span(span.resource, span.name, max(0.0, span.start_s - start_s), span.end_s - start_s)
            )
    found = stalls(operations, timeline, start_s, end_s)
    if hardware.step_overhead_s:
        found["overhead"] = hardware.step_overhead_s
    return SimulatedStep(
        step_s=step_s,
        tokens_per_s=plan.batch_samples * plan.tokens_per_sample / step_s,
        model_tflops=model_flops / step_s / 1e12,
        hardware_tflops=moved["compute"] / step_s / 1e12,
        stall_s=found,
        busy_s=dict(busy),
        read_nbytes=moved["read"],
        written_nbytes=moved["write"],
        h2d_nbytes=moved["h2d"],
        d2h_nbytes=moved["d2h"],
        peak_nbytes={tier: timeline.peak_nbytes(tier) for tier in TIERS},
        endurance_steps=endurance_steps(hardware, moved["write"]),
        spans=spans,
        memory={tier: _from(timeline.memory[tier], start_s, timeline.total_s) for tier in TIERS},
    )


def _from(line: list[tuple[float, int]], start_s: float, end_s: float) -> list[tuple[float, int]]:
    """A tier's bytes over time, from `start_s` (which becomes zero) to `end_s`."""
    before = [nbytes for at_s, nbytes in line if at_s <= start_s]
    later = [(at_s - start_s, nbytes) for at_s, nbytes in line if at_s > start_s]
    first = before[-1] if before else 0
    last = later[-1][1] if later else first
    return [(0.0, first), *later, (end_s - start_s, last)]

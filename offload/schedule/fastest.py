"""Of several plans for one workload, the one whose step is shortest in simulated time."""

from __future__ import annotations

from collections.abc import Sequence

from offload.planner.hardware import Hardware
from offload.planner.plan import Plan
from offload.planner.workload import Workload
from offload.schedule.run import STAGING_NBYTES, simulate_plan

ALIKE = 1e-3
"""Steps that differ by less than this fraction count as equally long."""


def fastest(
    plans: Sequence[Plan], workload: Workload, hardware: Hardware, *, staging_nbytes: int = STAGING_NBYTES
) -> Plan:
    """The plan of the shortest simulated step; the first of those that are `ALIKE`. The formulas that plans are found
    by count a phase's resources as always busy; the simulator sees in which order things are there.

    `staging_nbytes`: host memory of the update pipeline. There has to be a plan.
    """
    simulated: list[tuple[float, Plan]] = []
    for plan in plans:
        known = next((step_s for step_s, other in simulated if other.activations == plan.activations), None)
        if known is None:
            known = simulate_plan(plan, workload, hardware, staging_nbytes=staging_nbytes).step_s
        simulated.append((known, plan))
    least_s = min(step_s for step_s, _ in simulated)
    return next(plan for step_s, plan in simulated if step_s <= least_s * (1 + ALIKE))

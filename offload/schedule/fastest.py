"""Of several plans for one workload, the one whose step is shortest in simulated time.

[Note: formulas and simulation] The formulas that plans are found by count a phase's resources as always busy; the
simulator sees in which order things are there. How much optimizer state stays on the device moves what has to be there
at the turn of two steps, which formulas see least of: plans that they find nearly as fast are compared by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offload.errors import BudgetError
from offload.planner.hardware import Hardware
from offload.planner.plan import Budgets, Plan, state_format_of
from offload.planner.search import make_plans
from offload.planner.workload import Workload
from offload.schedule.run import STAGING_NBYTES, simulate_plan
from offload.types import PAGE_NBYTES

NEARLY = 0.1
"""Plans whose predicted step is longer by this fraction than the shortest are simulated."""
SIMULATED_MAX = 6
ALIKE = 1e-3
"""Steps that differ by less than this fraction count as equally long."""


def fastest(
    plans: Sequence[Plan], workload: Workload, hardware: Hardware, *, staging_nbytes: int = STAGING_NBYTES
) -> Plan:
    """The plan of the shortest simulated step; the first of those that are `ALIKE` (see the note above).

    `staging_nbytes`: host memory of the update pipeline. There has to be a plan.
    """
    simulated: list[tuple[float, Plan]] = []
    for plan in plans:
        known = next((step_s for step_s, other in simulated if _alike(plan, other)), None)
        if known is None:
            known = simulate_plan(plan, workload, hardware, staging_nbytes=staging_nbytes).step_s
        simulated.append((known, plan))
    least_s = min(step_s for step_s, _ in simulated)
    return next(plan for step_s, plan in simulated if step_s <= least_s * (1 + ALIKE))


@dataclass(frozen=True)
class Fastest:
    """A plan, and what was found on the way to it."""

    plan: Plan
    least_s: float | None
    """Predicted seconds of the step that the formulas find shortest within the budgets; None where whole chunks and
    pages have narrowed these."""


def make_simulated_plan(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any] | None = None,
    *,
    batch_samples: int,
    chunk_elements: int | None = None,
) -> Plan:
    """The plan of `find_fastest`."""
    return find_fastest(
        workload, hardware, budgets, fixed, batch_samples=batch_samples, chunk_elements=chunk_elements
    ).plan


def find_fastest(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any] | None = None,
    *,
    batch_samples: int,
    chunk_elements: int | None = None,
) -> Fastest:
    """As `planner.search.make_plan`; of what that finds nearly as fast, the fastest by simulation.

    `chunk_elements`: parameters whose state a run moves as a whole; a limit on written bytes then counts whole chunks
    and pages, which the formulas do not know.
    """
    limit_nbytes = budgets.written_nbytes_per_step
    if chunk_elements is None or limit_nbytes is None:
        return _nearly_fastest(workload, hardware, budgets, fixed, batch_samples)
    padding_nbytes = budgets.written_padding_nbytes
    at_most = _padding_at_most(workload, chunk_elements, batch_samples)
    while True:
        try:
            found = _nearly_fastest(workload, hardware, budgets, fixed, batch_samples)
        except BudgetError:  # what is said to do has to do in whole chunks too
            budgets = replace(budgets, written_padding_nbytes=at_most)
            found = _nearly_fastest(workload, hardware, budgets, fixed, batch_samples)
            return replace(found, least_s=None)
        run = found.plan.model_copy(update={"chunk_elements": chunk_elements})
        excess = run.written_nbytes_per_step(workload) - limit_nbytes
        if excess <= 0:
            return found if budgets.written_padding_nbytes == padding_nbytes else replace(found, least_s=None)
        budgets = replace(budgets, written_padding_nbytes=budgets.written_padding_nbytes + excess)


def _padding_at_most(workload: Workload, chunk_elements: int, batch_samples: int) -> int:
    """Bytes that whole chunks and pages can add to what a plan writes: of every block a chunk that is not divided, the
    last page of each record, and that of every tensor of each micro-batch."""
    width = state_format_of(workload).state_nbytes
    numels = [*(b.stored_numel for b in workload.blocks), workload.root_stored_numel]
    chunks = sum(math.ceil(min(n, chunk_elements) * width) for n in numels)
    n_records = sum(-(-n // chunk_elements) for n in numels)
    n_tensors = batch_samples * sum(len(b.nbytes_by_tensor()) for b in workload.blocks)
    return chunks + PAGE_NBYTES * (n_records + n_tensors)


def _nearly_fastest(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any] | None,
    batch_samples: int,
) -> Fastest:
    plans = make_plans(workload, hardware, budgets, fixed, batch_samples=batch_samples, within=NEARLY)
    plan, first = plans[0], plans[0].predicted
    if len(plans) > 1:
        plan = fastest(plans[:SIMULATED_MAX], workload, hardware, staging_nbytes=budgets.staging_nbytes)
    return Fastest(plan, None if first is None else first.step_s)


def _alike(one: Plan, other: Plan) -> bool:
    """Whether both do the same."""
    return one.model_copy(update={"predicted": None}) == other.model_copy(update={"predicted": None})

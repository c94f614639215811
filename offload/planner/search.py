"""`make_plan`: the fastest plan that every budget allows, found by trying the whole space of `space.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.errors import BudgetError
from offload.planner.choice import choose
from offload.planner.explain import why_not
from offload.planner.hardware import Hardware
from offload.planner.plan import Budgets, Plan
from offload.planner.points import Search
from offload.planner.realise import plan_of
from offload.planner.workload import Workload


def make_plan(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any] | None = None,
    *,
    batch_samples: int,
) -> Plan:
    """The fastest plan for one step of `batch_samples` sequences that keeps to every budget.

    `fixed` holds the user's own choices by name (`space.FIXABLE`); the planner chooses the rest. Raises ConfigError
    for a fixed choice that cannot be understood and BudgetError, with the nearest changes that would do, when nothing
    fits. Deterministic.
    """
    fixed = fixed or {}
    choice = choose(workload, hardware, budgets, fixed, batch_samples)
    if choice is None:
        raise BudgetError(why_not(Search(workload, hardware, budgets, fixed, batch_samples), budgets))
    stays = choice.stays
    plan = plan_of(choice.search, choice.chosen, budgets)
    return plan.model_copy(update={"on_device_root": stays.root, "on_device_blocks": stays.n_blocks})

"""`make_plan`: the fastest plan that every budget allows, found in the whole space of `space.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from offload.errors import BudgetError, ConfigError
from offload.planner.choice import as_asked, choices
from offload.planner.explain import why_not
from offload.planner.hardware import Hardware
from offload.planner.plan import Budgets, ModelParameters, Plan
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
    return make_plans(workload, hardware, budgets, fixed, batch_samples=batch_samples)[0]


def make_plans(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any] | None = None,
    *,
    batch_samples: int,
    within: float = 0.0,
) -> list[Plan]:
    """The plan of `make_plan`, and after it those with another amount of optimizer state on the device whose predicted
    step is longer by no more than the fraction `within`: see schedule/fastest.py."""
    fixed = fixed or {}
    found = choices(workload, hardware, budgets, fixed, batch_samples, within=within)
    if not found:
        searches, largest = as_asked(workload, hardware, budgets, fixed, batch_samples)
        raise BudgetError(why_not(searches, budgets, largest))
    if not math.isfinite(found[0].chosen.step_s):
        raise ConfigError(f"hardware profile {hardware.name!r}: at its rates a step never ends; correct them")
    limit_s = found[0].chosen.step_s * (1 + within)
    parameters = ModelParameters.of(workload)
    return [
        plan_of(choice.search, choice.chosen, budgets).model_copy(
            update={
                "on_device_root": choice.stays.root,
                "on_device_blocks": choice.stays.n_blocks,
                "parameters": parameters,
            }
        )
        for number, choice in enumerate(found)
        if number == 0 or (within and choice.chosen.step_s <= limit_s)
    ]

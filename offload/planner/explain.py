"""Why a plan is as it is: the binding limit, what one more GB or drive would bring, and what would make a plan fit."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offload.errors import ConfigError
from offload.planner.choice import choose
from offload.planner.hardware import Hardware
from offload.planner.plan import Budgets, Plan
from offload.planner.points import Search, shapes
from offload.planner.tables import storage_limit
from offload.planner.workload import Workload

GB = 10**9
LIMITS = {
    "compute": "the device's arithmetic",
    "bus": "the bus between host and device",
    "storage": "the drives",
    "dram": "the bandwidth of DRAM",
    "cpu": "the update on the CPU",
}


@dataclass(frozen=True)
class Explanation:
    """Seconds a step would gain from a little more of each resource (0: nothing)."""

    binding: str
    one_more_gb_device_s: float
    one_more_gb_host_s: float
    one_more_drive_s: float | None
    """None without drives."""
    endurance_steps: float | None
    """Steps until the drives have taken all the writes their makers allow."""
    second_grad_buffer_nbytes: int
    """Device memory that a second gradient buffer would take."""

    def lines(self, plan: Plan) -> list[str]:
        """In words."""
        if plan.predicted is None:
            return []
        gains = {
            "one more GB of device memory": self.one_more_gb_device_s,
            "one more GB of host memory": self.one_more_gb_host_s,
        }
        if self.one_more_drive_s is not None:
            gains["one more drive like the first"] = self.one_more_drive_s
        step_s = plan.predicted.step_s
        text = [f"The step is bound by {LIMITS[self.binding]}."]
        waits_s = plan.predicted.exposed_seconds["gradient"]
        if waits_s >= 0.01 * step_s:
            text.append(
                f"The device waits {waits_s:.2f} s a step ({waits_s / step_s:.1%}) for gradients to leave the only "
                f"gradient buffer; a second one takes {_up(self.second_grad_buffer_nbytes)} of device memory."
            )
        for what, gain_s in gains.items():
            brings = "nothing" if gain_s < 5e-4 * step_s else f"{gain_s:.2f} s a step ({gain_s / step_s:.1%})"
            text.append(f"{what[0].upper()}{what[1:]} would bring {brings}.")
        if self.endurance_steps is not None:
            text.append(
                f"It writes {plan.predicted.bytes['written'] / GB:.1f} GB a step: the drives' endurance lasts "
                f"{self.endurance_steps:,.0f} steps."
            )
        return text


def explain(
    plan: Plan,
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any] | None = None,
    *,
    least_s: float | None = None,
) -> Explanation:
    """Plan again with one more GB of each memory and one more drive. `fixed` as it was given to `make_plan`; `least_s`:
    seconds of the step that the formulas find shortest within `budgets`, where that is known."""
    fixed = fixed or {}

    def step_s(allowed: Budgets, machine: Hardware, limit_s: float = math.inf) -> float:
        found = choose(workload, machine, allowed, fixed, plan.batch_samples, limit_s)
        return math.inf if found is None else found.chosen.step_s

    now_s = step_s(budgets, hardware) if least_s is None else least_s

    def gain(allowed: Budgets, machine: Hardware = hardware) -> float:
        then_s = step_s(allowed, machine, now_s)  # what is no shorter brings nothing
        return max(0.0, now_s - then_s) if math.isfinite(now_s) else 0.0

    drive_s = None
    if hardware.drives:
        wider = hardware.model_copy(update={"drives": (*hardware.drives, hardware.drives[0])})
        drive_s = gain(budgets, wider)
    written = plan.predicted.bytes["written"] if plan.predicted else 0.0
    known = [d.endurance_nbytes for d in hardware.drives if d.endurance_nbytes is not None]
    return Explanation(
        binding=plan.predicted.binding if plan.predicted else "compute",
        one_more_gb_device_s=gain(replace(budgets, device_memory_nbytes=budgets.device_memory_nbytes + GB)),
        one_more_gb_host_s=gain(replace(budgets, host_memory_nbytes=budgets.host_memory_nbytes + GB)),
        one_more_drive_s=drive_s,
        endurance_steps=min(known) * len(hardware.drives) / written if known and written else None,
        second_grad_buffer_nbytes=plan.grad_nbytes * max(b.stored_numel for b in workload.blocks),
    )


@dataclass(frozen=True)
class LowerBounds:
    """Below these no plan exists, whatever the other budgets are. Bytes."""

    device_memory_nbytes: int
    host_memory_nbytes: int


def lower_bounds(searches: Sequence[Search]) -> LowerBounds:
    """Least device and least host memory over all shapes; without drives, host memory holds all state that does not
    stay on the device."""
    every = [(search, shape) for search in searches for shape in shapes(search.space)]
    device = min(search.tables.device_nbytes(shape) for search, shape in every)
    host = min(search.least_host_nbytes(shape) for search, shape in every)
    return LowerBounds(device, host)


def _smallest(
    searches: Sequence[Search], with_value: Callable[[int], Budgets], start: int, stop: int
) -> int | None:
    """Smallest value of one budget, to 1 in 1,000, with which something fits; None if `stop` does not do.

    Most shapes need more than the best one so far, which one question settles, when they come in no order of need.
    """
    found: int | None = None
    order = [(search, shape) for search in searches for shape in shapes(search.space)]
    random.Random(0).shuffle(order)
    for search, shape in order:
        high = stop if found is None else found - max(1, found // 1000)
        if high < start or not search.shape_fits(shape, with_value(high)):
            continue
        low = start
        while high - low > max(1, high // 1000):
            middle = (low + high) // 2
            if search.shape_fits(shape, with_value(middle)):
                high = middle
            else:
                low = middle
        found = high
    return found


def why_not(searches: Sequence[Search], budgets: Budgets, largest: Mapping[str, int] | None = None) -> str:
    """The message of a BudgetError: what is lacking, and the nearest single changes that would do in any of `searches`,
    the first of which has the least on the device; with any of the values `largest` instead of that which is fixed by
    this name it fits too."""
    search = searches[0]
    model, workload = search.model, search.workload
    everything = int(search.tables.params_cum[-1] + search.tables.states_cum[-1]) + sum(model.grad_nbytes)
    everything += model.batch * sum(
        b.input_nbytes_per_sample + sum(t.nbytes_per_sample for t in b.saved) for b in workload.blocks
    )
    ceiling = 4 * everything + 64 * GB
    changes = []
    device, host, written = (
        budgets.device_memory_nbytes,
        budgets.host_memory_nbytes,
        budgets.written_nbytes_per_step,
    )
    needed = _smallest(searches, lambda n: replace(budgets, device_memory_nbytes=n), device, ceiling)
    if needed is not None:
        changes.append(f"device_memory='{_up(needed)}' (now {_now(device)})")
    needed = _smallest(searches, lambda n: replace(budgets, host_memory_nbytes=n), host, ceiling)
    if needed is not None:
        changes.append(f"host_memory='{_up(needed)}' (now {_now(host)})")
    if written is not None:
        needed = _smallest(searches, lambda n: replace(budgets, written_nbytes_per_step=n), written, ceiling)
        if needed is not None:
            changes.append(f"{_up(needed)} written a step (now {_now(written)})")
    limit = storage_limit(search.hardware, budgets)
    if search.hardware.drives and np.isfinite(limit):
        wider = [one.without_capacity() for one in searches]
        needed = _smallest(wider, lambda n: replace(budgets, storage_nbytes=n), int(limit), ceiling)
        if needed is not None:
            changes.append(f"{_up(needed)} of storage (now {_now(limit)})")
    if not search.hardware.drives:
        changes.append("storage=[directory on an SSD]")
    changes += [f"{name}={value}" for name, value in (largest or {}).items()]
    smaller = _smaller_batch(searches, budgets)
    if smaller:
        changes.append(f"a batch of {smaller} instead of {model.batch} samples")
    bounds = lower_bounds(searches)
    text = (
        f"{workload.name} with {model.batch} samples of {workload.tokens_per_sample} tokens does not fit on "
        f"{search.hardware.name}. "
    )
    if changes:
        text += "Any one of these would do: " + "; ".join(changes) + "."
    else:
        text += "No single change is enough."
    return text + (
        f" No plan exists below {_now(bounds.device_memory_nbytes)} of device memory or "
        f"{_now(bounds.host_memory_nbytes)} of host memory."
    )


def _up(nbytes: int) -> str:
    """In the budget grammar, rounded up so that what is said does fit."""
    unit, name = (GB, "GB") if nbytes >= GB else (10**6, "MB")
    return f"{-(-nbytes * 100 // unit) / 100:.2f}{name}"


def _now(nbytes: float) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB else f"{nbytes / 1e6:.2f} MB"


def _smaller_batch(searches: Sequence[Search], budgets: Budgets) -> int | None:
    """Largest half, quarter, ... of the batch that fits."""
    batch = searches[0].model.batch // 2
    while batch:
        try:
            first = searches[0].with_batch(batch)
            others = (search.with_batch(batch, first) for search in searches[1:])
            if any(search.fits(budgets) for search in itertools.chain((first,), others)):
                return batch
        except ConfigError:
            return None
        batch //= 2
    return None

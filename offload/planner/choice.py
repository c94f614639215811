"""The fastest point of the space, with as much optimizer state in device memory as makes steps shorter.

[Note: how much stays on the device] Where it is known how fast the device makes updates, the space is searched again
with the root's state in it, and with that of more and more first blocks, until they do not fit. How many are tried
depends on the model alone, so that more memory never makes the chosen step longer. Updates of state that stays are made
during backward, or wait where the user wants all of them to.

[Note: when some wait] Where the CPU takes longer for all updates than the device for its arithmetic, backward waits for
them while they leave the next forward nothing to do. Where host memory has no room for gradients of as many blocks,
whose updates would give way (`Plan.held_blocks`), the space is searched with a part of the blocks deferred too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from offload.errors import ConfigError
from offload.planner.cost_model import CostModel
from offload.planner.hardware import Hardware
from offload.planner.plan import Budgets, state_format_of
from offload.planner.points import Chosen, Search
from offload.planner.realise import plan_of
from offload.planner.space import FIXABLE
from offload.planner.states_on_device import (
    OnDevice,
    blocks_max,
    blocks_of,
    fill_device,
    streamed_workload,
)
from offload.planner.workload import Workload

STATES_ON_DEVICE = "states_on_device"
LARGEST = {STATES_ON_DEVICE: 0, "grad_buffers": 1, "prefetch_blocks": 1}
"""Fixed choices that take the more device memory the larger they are, and the least of each."""
SOME_WAIT = (0.25, 0.5)
"""The parts of the blocks that are deferred. More of them fill forward with what backward had room for."""


@dataclass(frozen=True)
class Choice:
    """A point, the search it is of, and what that search has left on the device."""

    search: Search
    chosen: Chosen
    stays: OnDevice


def choose(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any],
    batch_samples: int,
    limit_s: float = math.inf,
) -> Choice | None:
    """The fastest of all that fits, or None; of one that takes longer than `limit_s` it may be another. Raises
    ConfigError for a fixed choice that is not to be had."""
    found = choices(workload, hardware, budgets, fixed, batch_samples, limit_s=limit_s)
    return next(iter(found), None)


def choices(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any],
    batch_samples: int,
    *,
    within: float = 0.0,
    limit_s: float = math.inf,
) -> list[Choice]:
    """The fastest that fits for each amount of state on the device, and where some updates wait; the fastest of all
    first. Of those that take longer than `limit_s`, or than the fastest by more than the fraction `within`, some may
    be missing, or not be the fastest of their kind."""
    longest_s = limit_s
    every: list[Choice] = []

    def found_in(stays: OnDevice, search: Search) -> list[Choice]:
        nonlocal longest_s
        chosen = search.best(budgets, longest_s)
        if chosen is None:
            return []
        longest_s = min(longest_s, chosen.step_s * (1 + within))
        return [Choice(search, chosen, stays)]

    def found_where_some_wait() -> list[Choice]:
        parts = [{**fixed, "deferred_fraction": part} for part in SOME_WAIT]
        there = [_search(workload, hardware, budgets, more, batch_samples, OnDevice()) for more in parts]
        return [choice for search in there for choice in found_in(OnDevice(), search)]

    first: tuple[OnDevice, Search] | None = None
    for stays, search in searches(workload, hardware, budgets, fixed, batch_samples):
        first = first or (stays, search)
        every += found_in(stays, search)
    if first is not None and not first[0] and _could_wait(first[1].model, budgets, fixed):
        if math.isinf(limit_s):
            if every and not every[0].stays and _some_may_wait(first[1], every[0].chosen, budgets):
                every += found_where_some_wait()
        elif late := [choice for choice in found_where_some_wait() if choice.chosen.step_s <= limit_s]:
            # Only now is it worth a look in full whether some may.
            chosen = first[1].best(budgets)
            if chosen is not None and _some_may_wait(first[1], chosen, budgets):
                every += late
    return sorted(every, key=lambda choice: choice.chosen.step_s)  # of equals that with less on the device


def searches(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any],
    batch_samples: int,
    *,
    in_any_room: bool = False,
) -> Iterator[tuple[OnDevice, Search]]:
    """What stays on the device and the search of the rest: as the user wants it, or with nothing there and then with
    more and more, as far as the budget has room. More on the device may fit where less does not: host memory has less
    to hold then. `in_any_room`: whatever the budget is."""
    asked = _asked(workload, hardware, budgets, fixed)
    first = OnDevice() if asked is None else asked
    with_least = _search(workload, hardware, budgets, fixed, batch_samples, first)
    yield first, with_least
    may = _may(workload, hardware, budgets, fixed) and hardware.device_adam_params_per_s is not None
    if asked is not None or not may:
        return
    most = blocks_max([block.stored_numel for block in workload.blocks])
    for root in (False, True) if workload.root_stored_numel else (False,):
        for n_blocks in _numbers(most, root):
            stays = OnDevice(root, n_blocks)
            search = _search(workload, hardware, budgets, fixed, batch_samples, stays, with_least)
            if not in_any_room and next(search.shapes_that_fit(budgets), None) is None:
                break
            yield stays, search


def as_asked(
    workload: Workload, hardware: Hardware, budgets: Budgets, fixed: Mapping[str, Any], batch_samples: int
) -> tuple[list[Search], dict[str, int]]:
    """The searches of what the user wants to stay on the device, or of all that may, and by name the largest value of
    a fixed choice with which it fits (`LARGEST`), where less than what is asked for is what is lacking."""
    every = searches(workload, hardware, budgets, fixed, batch_samples, in_any_room=True)
    found = [search for _, search in every]

    def fits(name: str, wanted: int) -> bool:
        changed = {**fixed, name: wanted}
        stays = _asked(workload, hardware, budgets, changed) or OnDevice()
        return _search(workload, hardware, budgets, changed, batch_samples, stays).fits(budgets)

    largest = {}
    for name, least in LARGEST.items():
        if fixed.get(name) is None or fixed[name] <= least or not fits(name, least):
            continue
        low, high = least, min(fixed[name], budgets.device_memory_nbytes)
        while high - low > max(
            1, high // 1000
        ):  # bytes to 1 in 1,000; of blocks every one that a device may hold
            middle = (low + high) // 2
            low, high = (middle, high) if fits(name, middle) else (low, middle)
        largest[name] = low
    if STATES_ON_DEVICE in largest:
        stays = _asked(workload, hardware, budgets, {**fixed, STATES_ON_DEVICE: largest[STATES_ON_DEVICE]})
        largest[STATES_ON_DEVICE] = largest[STATES_ON_DEVICE] if stays else 0
    return found, largest


def _search(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any],
    batch_samples: int,
    stays: OnDevice,
    like: Search | None = None,
) -> Search:
    """Of the plans with this on the device."""
    others = {name: value for name, value in fixed.items() if name != STATES_ON_DEVICE}
    waits = _waits(budgets, others)
    more = {"update": "backward"} if stays and not waits else {}
    rest = streamed_workload(workload, state_format_of(workload), stays, keeps_gradients=waits)
    return Search(rest, hardware, budgets, {**others, **more}, batch_samples, like)


def _numbers(most: int, root: bool) -> Iterator[int]:
    """Blocks whose state stays: few at first, then half as many more each time."""
    n = 0 if root else 1
    while n < most:
        yield n
        n = max(n + 1, n * 3 // 2)
    if most >= (0 if root else 1):
        yield most


def _waits(budgets: Budgets, fixed: Mapping[str, Any]) -> bool:
    """Whether all updates wait for the end of the step."""
    return budgets.clips_gradients or fixed.get("update") == "deferred"


def _could_wait(model: CostModel, budgets: Budgets, fixed: Mapping[str, Any]) -> bool:
    """See [Note: when some wait]; whatever host memory has room for. Not where the user has decided which do."""
    rates = model.rates
    if rates.shares_host or budgets.clips_gradients or "deferred_fraction" in fixed:
        return False
    computed_s = (model.forward_work + model.backward_work) / rates.flops_per_s
    return fixed.get("update", "auto") == "auto" and model.trainable / rates.update_params_per_s > computed_s


def _some_may_wait(search: Search, chosen: Chosen, budgets: Budgets) -> bool:
    """Whether the fastest with nothing on the device has no room for as many gradients, where some could wait."""
    n_held = len(plan_of(search, chosen, budgets).held_blocks)
    return n_held < SOME_WAIT[0] * len(search.workload.blocks)


def _may(workload: Workload, hardware: Hardware, budgets: Budgets, fixed: Mapping[str, Any]) -> bool:
    """Whether state can stay on the device at all."""
    if hardware.shares_host or budgets.durable_steps or not workload.rule.made_on_device:
        return False
    return fixed.get("update", "auto") != "mixed" and "deferred_fraction" not in fixed


def _asked(
    workload: Workload, hardware: Hardware, budgets: Budgets, fixed: Mapping[str, Any]
) -> OnDevice | None:
    """What the user wants to stay; None: nothing was said."""
    wanted = fixed.get(STATES_ON_DEVICE)
    if wanted is None:
        return None
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 0:
        raise ConfigError(f"{STATES_ON_DEVICE}={wanted!r}: it must be {FIXABLE[STATES_ON_DEVICE]}")
    if wanted == 0:
        return OnDevice()
    if not _may(workload, hardware, budgets, fixed):
        raise ConfigError(
            f"{STATES_ON_DEVICE}={wanted}: state stays on a device with memory of its own, for AdamW, Adam, SGD and "
            "Lion on fp32 moments, where no step is kept on storage and not only some updates wait"
        )
    blocks, root = blocks_of(workload, state_format_of(workload))
    return fill_device(blocks, root, wanted, keeps_gradients=_waits(budgets, fixed))

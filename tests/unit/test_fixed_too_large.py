"""A fixed choice for which there is no memory: the message names the largest that fits."""

from __future__ import annotations

import re

import pytest

from offload.errors import BudgetError
from offload.planner.plan import Budgets
from offload.planner.search import make_plan
from tests.planning import MB, STAGING, gpt, small_machine

WORK = gpt("small", 6, 256, tokens=128, vocab=2000)
NARROW = {"activations": "recompute", "update": "backward", "params_host_fraction": 1.0}


@pytest.mark.parametrize(("name", "device_mb"), [("grad_buffers", 60), ("prefetch_blocks", 19)])
def test_a_choice_that_is_too_large_is_refused_with_the_largest_that_fits(name, device_mb) -> None:
    """Against trying one value after the other."""
    machine, budgets = small_machine(1, False), Budgets(device_mb * MB, 200 * MB, staging_nbytes=STAGING)

    def fits(value: int) -> bool:
        try:
            make_plan(WORK, machine, budgets, {**NARROW, name: value}, batch_samples=2)
        except BudgetError:
            return False
        return True

    with pytest.raises(BudgetError, match=rf"{name}=\d+") as refused:
        make_plan(WORK, machine, budgets, {**NARROW, name: 1_000_000}, batch_samples=2)
    named = int(re.search(rf"{name}=(\d+)", str(refused.value))[1])
    assert fits(named)
    assert not fits(named + 1)

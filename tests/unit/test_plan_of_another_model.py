"""A saved plan is for one model: another with as many blocks is refused, and the message names what differs."""

from __future__ import annotations

import pytest

from offload.cli.simulate import SimulateSettings, _plan
from offload.errors import ConfigError
from offload.planner.plan import Budgets, Plan
from offload.planner.search import make_plan
from tests.planning import MB, gpt, small_machine

WORK = gpt("narrow", 4, 256, tokens=64, vocab=2000)
WIDE = gpt("wide", 4, 320, tokens=64, vocab=2000)
MACHINE, BUDGETS = small_machine(1, False), Budgets(60 * MB, 200 * MB)


def simulated(plan: Plan, work) -> Plan:
    settings = SimulateSettings(
        work.name, None, [], 2, 64, None, [], "plan.json", "offload", None, None, False
    )  # fmt: skip
    return _plan(settings, plan, work, MACHINE, BUDGETS)


def test_a_plan_of_a_model_with_other_blocks_is_refused_by_name() -> None:
    plan = Plan.from_json(make_plan(WORK, MACHINE, BUDGETS, batch_samples=2).to_json())
    assert simulated(plan, WORK) == plan
    planned, found = (12 * h * h + 13 * h for h in (256, 320))
    with pytest.raises(
        ConfigError, match=f"plan.json.*block0 has {planned:,} parameters there, and {found:,} in wide"
    ):
        simulated(plan, WIDE)


def test_a_plan_with_other_tensors_is_refused_by_name() -> None:
    plan = make_plan(WORK, MACHINE, BUDGETS, batch_samples=2)
    blocks = tuple(
        {("relu" if name == "gelu" else name): o for name, o in b.items()} for b in plan.activations
    )
    with pytest.raises(ConfigError, match="block0 saves 'gelu' for backward in narrow alone"):
        simulated(plan.model_copy(update={"activations": blocks}), WORK)


def test_a_plan_of_an_older_release_is_read() -> None:
    plan = make_plan(WORK, MACHINE, BUDGETS, batch_samples=2)
    text = plan.model_copy(update={"parameters": None}).model_dump_json(exclude={"parameters"})
    assert simulated(Plan.from_json(text), WORK).parameters is None

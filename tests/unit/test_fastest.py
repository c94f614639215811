"""Of several plans, the one whose step is shortest in simulated time."""

from __future__ import annotations

from offload.planner.plan import INPUT, Budgets, Plan
from offload.planner.search import make_plan
from offload.schedule import fastest as module
from offload.schedule.fastest import fastest
from tests.planning import STAGING, gpt, small_machine

WORK, MACHINE = gpt("small", 4, 64, tokens=64, vocab=200), small_machine(1, False)


def plans() -> list[Plan]:
    """Everything recomputed, and every saved tensor on storage."""
    budgets = Budgets(10**8, 10**8, staging_nbytes=STAGING)
    recomputed = make_plan(
        WORK, MACHINE, budgets, {"activations": "recompute", "micro_batches": 2}, batch_samples=4
    )
    stored = tuple(
        {name: "storage" for name in outcomes if name != INPUT} for outcomes in recomputed.activations
    )
    inputs = tuple(
        {INPUT: outcomes[INPUT], **of} for outcomes, of in zip(recomputed.activations, stored, strict=True)
    )
    return [recomputed.model_copy(update={"activations": inputs}), recomputed]


def test_the_shortest_simulated_step_is_chosen_wherever_it_stands():
    slow, fast = plans()
    assert fastest([slow, fast], WORK, MACHINE) is fast
    assert fastest([fast, slow], WORK, MACHINE) is fast


def test_of_equals_the_first_is_chosen_and_none_is_simulated_twice(monkeypatch):
    _, plan = plans()
    simulated = []
    real = module.simulate_plan
    monkeypatch.setattr(
        module, "simulate_plan", lambda plan, *a, **k: simulated.append(plan) or real(plan, *a, **k)
    )
    same = plan.model_copy()
    assert fastest([plan, same], WORK, MACHINE) is plan
    assert fastest([same, plan], WORK, MACHINE) is same
    assert simulated == [plan, same]

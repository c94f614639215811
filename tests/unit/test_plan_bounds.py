"""What every plan promises: no tier above its budget, more is never slower, refused only below the stated bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planner.choice import searches
from offload.planner.explain import lower_bounds
from offload.planner.memory import Shape, device_need, host_need
from offload.planner.plan import SPLIT_MASTER, Budgets, Plan
from offload.planner.search import make_plan
from offload.planner.space import OFF_DEVICE_MICRO_BATCHES_MIN
from offload.schedule.run import simulate_plan
from tests.planning import STAGING, gpt, small_machine, step_s

BUDGETS = ("device_memory_nbytes", "host_memory_nbytes", "storage_nbytes", "written_nbytes_per_step")


@st.composite
def cases(draw):
    """A small model, a machine, a batch and budgets from far too little to plenty."""
    work = gpt(
        "small",
        draw(st.integers(1, 5)),
        draw(st.sampled_from([64, 128])),
        tokens=draw(st.sampled_from([16, 64])),
        vocab=200,
    )
    machine = small_machine(draw(st.integers(0, 2)), draw(st.booleans()), draw(st.sampled_from([0.5, 50.0])))
    if not machine.shares_host:
        machine = machine.model_copy(
            update={"device_adam_params_per_s": draw(st.sampled_from([None, 1e7, 1e10]))}
        )
    scale = 4 * 16 * work.numel
    budgets = Budgets(
        device_memory_nbytes=int(scale * draw(st.floats(0.02, 1.0))),
        host_memory_nbytes=int(scale * draw(st.floats(0.0, 1.0))),
        storage_nbytes=draw(st.none() | st.integers(scale // 20, scale)),
        written_nbytes_per_step=draw(st.none() | st.integers(scale // 50, scale)),
        staging_nbytes=STAGING,
        clips_gradients=draw(st.booleans()),
    )
    return work, machine, budgets, draw(st.integers(1, 6))


def quick(test):
    return settings(
        max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )(test)


def plan_that_fits(work, machine, budgets, batch) -> Plan:
    """The plan; an example that is refused does not count."""
    try:
        return make_plan(work, machine, budgets, batch_samples=batch)
    except BudgetError:
        reject()


@pytest.mark.slow
@quick
@given(cases())
def test_no_tier_is_ever_above_its_budget_in_the_plan_or_in_the_simulation(case) -> None:
    work, machine, budgets, batch = case
    plan = plan_that_fits(work, machine, budgets, batch)
    simulated = simulate_plan(plan, work, machine, staging_nbytes=STAGING)
    limits = {
        "device": budgets.device_memory_nbytes,
        "host": budgets.host_memory_nbytes,
        "storage": budgets.storage_nbytes,
    }
    for tier, limit in limits.items():
        if limit is not None:
            assert plan.predicted.peak_nbytes[tier] <= limit
            assert simulated.peak_nbytes[tier] <= limit + 64  # fractions of bytes, rounded
    if budgets.written_nbytes_per_step is not None:
        assert simulated.written_nbytes <= budgets.written_nbytes_per_step * (1 + 1e-9) + 64


@pytest.mark.slow
@quick
@given(cases())
def test_the_simulated_step_moves_the_bytes_that_were_predicted(case) -> None:
    work, machine, budgets, batch = case
    plan = plan_that_fits(work, machine, budgets, batch)
    simulated = simulate_plan(plan, work, machine, staging_nbytes=STAGING)
    for name, nbytes in (
        ("read", simulated.read_nbytes),
        ("written", simulated.written_nbytes),
        ("h2d", simulated.h2d_nbytes),
        ("d2h", simulated.d2h_nbytes),
    ):
        # a block that stays in its slot at a turn may be one with parameters in host memory: counted as the average
        slack = 4 * plan.n_slots * 2 * max(b.trainable_numel for b in work.blocks) if name == "read" else 1e3
        assert nbytes == pytest.approx(plan.predicted.bytes[name], rel=1e-6, abs=slack)
    assert simulated.step_s >= 0.999 * plan.predicted.lower_bound_s - 1e-9


@pytest.mark.slow
@quick
@given(cases(), st.sampled_from(BUDGETS), st.floats(1.0, 4.0))
def test_more_of_any_budget_is_never_slower(case, name, factor) -> None:
    work, machine, budgets, batch = case
    assume(getattr(budgets, name) is not None)
    more = replace(budgets, **{name: int(getattr(budgets, name) * factor) + 1})
    before = plan_that_fits(work, machine, budgets, batch).predicted.step_s
    assert step_s(work, machine, more, batch) <= before * (1 + 1e-6)


@pytest.mark.slow
@quick
@given(cases())
def test_a_further_drive_is_never_slower(case) -> None:
    work, machine, budgets, batch = case
    assume(machine.drives)
    before = plan_that_fits(work, machine, budgets, batch).predicted.step_s
    wider = machine.model_copy(update={"drives": (*machine.drives, machine.drives[0])})
    assert step_s(work, wider, budgets, batch) <= before * (1 + 1e-6)


@quick
@given(cases())
def test_refused_only_where_the_stated_bound_says_so(case) -> None:
    """With storage and without limits on it, the two memories decide alone, and each has its own bound."""
    work, machine, budgets, batch = case
    assume(machine.drives)
    budgets = replace(budgets, storage_nbytes=None, written_nbytes_per_step=None)
    every = searches(work, machine, budgets, {}, batch, in_any_room=True)
    bounds = lower_bounds([search for _, search in every])
    try:
        make_plan(work, machine, budgets, batch_samples=batch)
    except BudgetError as error:
        if (
            budgets.device_memory_nbytes >= bounds.device_memory_nbytes
            and budgets.host_memory_nbytes >= bounds.host_memory_nbytes
        ):
            # Each alone would do, but the boundary is either on the device or in host memory.
            assert all(
                not fits_by_hand(work, machine, budgets, batch, shape)
                for shape in every_shape(work, batch, machine)
            )
        assert f"{bounds.device_memory_nbytes / 1e6:.2f} MB of device memory" in str(error)
    else:
        assert budgets.device_memory_nbytes >= bounds.device_memory_nbytes
        assert budgets.host_memory_nbytes >= bounds.host_memory_nbytes


def every_shape(work, batch, machine):
    boundaries = (True,) if machine.shares_host else (True, False)
    return [
        Shape(m, s, g, b)
        for m in range(1, batch + 1)
        for s in {min(2, len(work.blocks))}
        for g in (1,)
        for b in boundaries
        if b or m >= OFF_DEVICE_MICRO_BATCHES_MIN
    ]


def fits_by_hand(work, machine, budgets, batch, shape) -> bool:
    """Nothing placed by choice, every activation on storage."""
    device = device_need(work, SPLIT_MASTER, batch, shape).total
    host = host_need(
        work,
        SPLIT_MASTER,
        batch,
        shape,
        staging_nbytes=budgets.staging_nbytes,
        shares_host=machine.shares_host,
        has_storage=True,
    )
    return device <= budgets.device_memory_nbytes and host <= budgets.host_memory_nbytes

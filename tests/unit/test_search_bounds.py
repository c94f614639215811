"""The search leaves out what cannot win, and only that: its plans are those of trying every point."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planner import points
from offload.planner import tables as tables_module
from offload.planner.bounds import least_step_s
from offload.planner.choice import choices, choose, searches
from offload.planner.explain import explain
from offload.planner.hardware import load_hardware
from offload.planner.placement import held_updates
from offload.planner.plan import Budgets
from offload.planner.points import TIE, Search
from offload.planner.search import make_plan, make_plans
from offload.schedule.fastest import find_fastest
from tests.planning import STAGING, gpt, small_machine


@st.composite
def cases(draw):
    """A small model, a machine, budgets from far too little to plenty, a batch and fixed choices."""
    work = gpt("small", draw(st.integers(1, 6)), draw(st.sampled_from([64, 128])), tokens=32, vocab=200)
    machine = small_machine(draw(st.integers(0, 2)), draw(st.booleans()), draw(st.sampled_from([0.5, 50.0])))
    machine = machine.model_copy(
        update={
            "adam_params_per_s": machine.adam_params_per_s * draw(st.sampled_from([0.02, 1.0])),
            "h2d_duplex_bytes_per_s": draw(st.none() | st.sampled_from([2e8, 1e12])),
            "device_adam_params_per_s": draw(st.sampled_from([None, 1e7, 1e10])),
        }
    )
    scale = 4 * 16 * work.numel
    budgets = Budgets(
        device_memory_nbytes=int(scale * draw(st.floats(0.02, 1.0))),
        host_memory_nbytes=int(scale * draw(st.floats(0.0, 1.0))),
        storage_nbytes=draw(st.none() | st.integers(scale // 20, scale)),
        written_nbytes_per_step=draw(st.none() | st.integers(scale // 50, scale)),
        staging_nbytes=STAGING,
        clips_gradients=draw(st.booleans()),
        durable_steps=draw(st.booleans()),
    )
    fixed = draw(
        st.sampled_from(
            [
                {},
                {"update": "mixed"},
                {"states_host_fraction": 0.25},
                {"params_host_fraction": 0.5},
                {"activations": "save"},
                {"activations": "recompute", "activations_host_fraction": 0.5},
                {"inputs": "storage"},
                {"activations_on_device": False},
                {"boundary_on_device": False},
            ]
        )
    )
    if budgets.clips_gradients and "update" in fixed:
        fixed = {}
    if machine.shares_host and "boundary_on_device" in fixed:
        fixed = {}
    return work, machine, budgets, draw(st.integers(1, 8)), fixed


def drawn(test):
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=checks)(test)


def every_step_s(search: Search, shape, budgets: Budgets) -> np.ndarray:
    """[waiting, saved set, share, parameters]: infinite where a point does not fit."""
    needs = search.tables.needs(shape, budgets)
    step_s = np.broadcast_to(search.model.cost(needs.load).step_s, needs.fits.shape)
    return np.where(needs.fits, step_s, np.inf)


def best_of_all(search: Search, budgets: Budgets):
    """(step, shape, index): every point in order, without a bound."""
    best = None
    for shape in search.shapes_that_fit(budgets):
        step_s = every_step_s(search, shape, budgets)
        if not np.isfinite(step_s).any():
            continue
        load = search.tables.needs(shape, budgets).load
        written = sum(traffic.written for traffic in search.model.cost(load).traffic)
        written = np.where(step_s <= step_s.min() * (1 + TIE), np.broadcast_to(written, step_s.shape), np.inf)
        index = tuple(int(i) for i in np.unravel_index(written.argmin(), written.shape))
        rank = (
            float(written[index]),
            shape.micro_batches,
            -shape.n_grad_buffers,
            abs(shape.n_slots - 3),
            not shape.boundary_on_device,
        )
        found = (float(step_s[index]), rank, shape, index)
        is_shorter = best is None or found[0] < best[0] * (1 - TIE)
        if is_shorter or (found[0] <= best[0] * (1 + TIE) and rank < best[1]):
            best = found
    return None if best is None else (best[0], best[2], best[3])


@given(cases())
@drawn
def test_no_point_is_faster_than_the_bound_of_its_shape_and_saved_set(case):
    work, machine, budgets, batch, fixed = case
    for _, search in searches(work, machine, budgets, fixed, batch):
        shapes = list(search.shapes_that_fit(budgets))
        if not shapes:
            continue
        bound_s = least_step_s(search.tables, shapes, budgets)
        for shape, least_s in zip(shapes, bound_s, strict=True):
            found_s = every_step_s(search, shape, budgets).min(axis=(0, 2, 3))
            assert (least_s <= found_s * (1 + 1e-9)).all()


@given(cases(), st.sampled_from([math.inf, 1.0, 1.5]))
@drawn
def test_a_search_finds_what_trying_every_point_finds(case, limit):
    work, machine, budgets, batch, fixed = case
    for _, search in searches(work, machine, budgets, fixed, batch):
        wanted = best_of_all(search, budgets)
        found = search.best(budgets, math.inf if wanted is None else wanted[0] * limit)
        assert (None if found is None else (found.step_s, found.shape, found.index)) == wanted


@pytest.mark.parametrize(
    ("host_share", "shares_host", "clips"), [(0.3, False, False), (0.8, False, True), (0.8, True, False)]
)
def test_plans_and_explanations_are_those_of_a_search_that_leaves_nothing_out(
    monkeypatch, host_share, shares_host, clips
):
    work, machine = gpt("small", 4, 128, tokens=64, vocab=200), small_machine(1, shares_host)
    scale = 16 * work.numel
    budgets = Budgets(scale, int(host_share * scale) + 10**7, staging_nbytes=STAGING, clips_gradients=clips)
    machine = machine.model_copy(update={"device_adam_params_per_s": None if shares_host else 1e8})

    def found():
        plans = make_plans(work, machine, budgets, batch_samples=3, within=0.1)
        return plans, explain(plans[0], work, machine, budgets)

    left_out = found()

    def nothing(tables, every, _):
        return np.zeros((len(every), len(tables.saved)))

    monkeypatch.setattr(points, "least_step_s", nothing)
    assert left_out == found()


def test_most_points_are_not_looked_at(monkeypatch):
    work, machine = gpt("7b", 32, 4096), load_hardware("rtx4090-12ssd")
    budgets = Budgets(24 * 10**9, 600 * 10**9)
    all_points = sum(
        search.tables.needs(shape, budgets).fits.size
        for _, search in searches(work, machine, budgets, {}, 16)
        for shape in search.shapes_that_fit(budgets)
    )
    looked_at = []
    original = points.Search._best_of

    def counting(self, shape, needs, sets):
        looked_at.append(needs.fits.size)
        return original(self, shape, needs, sets)

    monkeypatch.setattr(points.Search, "_best_of", counting)
    make_plan(work, machine, budgets, batch_samples=16)
    assert 0 < sum(looked_at) < all_points / 4


def test_choices_beyond_what_is_asked_for_are_left_out_and_no_others():
    work, machine = gpt("1b", 24, 2048), load_hardware("rtx4090-2ssd")
    budgets = Budgets(24 * 10**9, 100 * 10**9)
    every = choices(work, machine, budgets, {}, 8, within=math.inf)
    near = choices(work, machine, budgets, {}, 8, within=0.1)
    limit_s = every[0].chosen.step_s * 1.1

    def within(found):
        return [(c.chosen, c.stays) for c in found if c.chosen.step_s <= limit_s]

    assert within(near) == within(every)
    assert len(near) <= len(every)


def where_some_wait():
    """A model whose fastest plan lets a part of the updates wait, with the machine and budgets for it."""
    work, machine = gpt("7b", 32, 4096), load_hardware("rtx4090-12ssd")
    slow = {"adam_params_per_s": 4e8, "device_adam_params_per_s": None}
    return work, machine.model_copy(update=slow), Budgets(24 * 10**9, 40 * 10**9)


def test_a_limit_leaves_the_choice_of_what_is_shorter_as_it_is():
    work, machine, budgets = where_some_wait()
    whole = choose(work, machine, budgets, {}, 16)
    assert 0 < whole.search.tables.waiting[whole.chosen.index[0]][0] < 32  # of blocks
    for limit_s in (whole.chosen.step_s * 1.0001, whole.chosen.step_s * 1.5):
        found = choose(work, machine, budgets, {}, 16, limit_s)
        assert (found.chosen, found.stays) == (whole.chosen, whole.stays)
    found = choose(work, machine, budgets, {}, 16, whole.chosen.step_s * 0.9)
    assert found is None or found.chosen.step_s > whole.chosen.step_s * 0.9


def test_nothing_is_looked_at_in_full_below_a_limit_that_nothing_keeps(monkeypatch):
    work, machine, budgets = where_some_wait()
    limits = []
    original = points.Search.best

    def seen(self, allowed, limit_s=math.inf):
        limits.append(limit_s)
        return original(self, allowed, limit_s)

    monkeypatch.setattr(points.Search, "best", seen)
    choose(work, machine, budgets, {}, 16, 1e-3)
    assert set(limits) == {1e-3}


@pytest.mark.parametrize("shares_host", [False, True])
def test_an_explanation_is_the_same_where_the_shortest_step_is_handed_over(shares_host):
    work, machine = gpt("small", 4, 128, tokens=64, vocab=200), small_machine(1, shares_host)
    machine = machine.model_copy(update={"device_adam_params_per_s": None if shares_host else 1e8})
    budgets = Budgets(16 * work.numel, 8 * work.numel + 10**7, staging_nbytes=STAGING)
    found = find_fastest(work, machine, budgets, batch_samples=3)
    assert found.least_s == choose(work, machine, budgets, {}, 3).chosen.step_s
    handed_over = explain(found.plan, work, machine, budgets, least_s=found.least_s)
    assert handed_over == explain(found.plan, work, machine, budgets)


def test_updates_that_give_way_are_as_many_as_half_of_what_is_left_pays_for():
    work, machine = gpt("small", 5, 128, tokens=32, vocab=200), small_machine(1, False)
    tables = Search(work, machine, Budgets(10**9, 10**9), {}, 2).tables
    for shape in points.shapes(tables.space):
        sizes = (len(tables.waiting), len(tables.saved), 3, len(tables.params_counts))
        left = np.random.default_rng(0).integers(-(10**6), 10**8, sizes).astype(float)
        held, nbytes = tables._held_over_bus(shape, left)
        grad = max(tables.model.grad_nbytes)
        for at in np.ndindex(sizes):
            late, per_buffer = tables.waiting[at[0]][0], 1
            if tables.model.grads_once(shape.micro_batches, late):
                per_buffer = 2
            may = late == 0 and tables.params_counts[at[3]] == 5
            wanted = held_updates(int(left[at]), grad, per_buffer, 5) if may else (0, 0)
            assert (held[at], nbytes[at]) == (wanted[0], wanted[1] * grad)


def test_a_refusal_finds_saved_sets_once_for_each_batch_that_it_tries(monkeypatch):
    work, machine = gpt("7b", 32, 4096), load_hardware("rtx4090-12ssd")
    batches = []
    original = tables_module._candidates

    def seen(*given):
        batches.append(None)
        return original(*given)

    monkeypatch.setattr(tables_module, "_candidates", seen)
    with pytest.raises(BudgetError, match="does not fit"):
        make_plan(work, machine, Budgets(10**9, 10**9), batch_samples=8)
    assert len(batches) <= 2 + 3 + 2  # the batch itself, asked twice; 4, 2, 1; two where some wait

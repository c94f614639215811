"""Plans keep optimizer state in device memory where that makes steps shorter, and count what it takes and saves."""

import itertools
import re
from dataclasses import replace

import pytest

from offload.errors import BudgetError, ConfigError
from offload.planner.choice import searches
from offload.planner.explain import explain, lower_bounds
from offload.planner.plan import SPLIT_MASTER, Budgets, Plan
from offload.planner.points import Search
from offload.planner.report import plan_lines
from offload.planner.search import make_plan
from offload.planner.states_on_device import (
    OnDevice,
    blocks_of,
    scratch_nbytes,
    streamed_by,
    streamed_workload,
)
from offload.schedule.run import simulate_plan
from offload.schedule.unroll import Unroller, unroll
from offload.update_rules import kernel_rule
from tests.planning import STAGING, gpt, small_machine

WORK = gpt("small", 8, 128, tokens=64, vocab=1000)
ROOM = 14 * WORK.numel
"""Of the whole training state, bytes."""
QUICK = {"micro_batches": 2}


def machine(rate=5e9, n_drives=0):
    return small_machine(n_drives, False).model_copy(update={"device_adam_params_per_s": rate})


def budgets(share_of_state, **more):
    return Budgets(int(share_of_state * ROOM), 4 * ROOM, staging_nbytes=STAGING, **more)


def planned(share_of_state=0.6, on=None, fixed=None, batch=8, work=WORK, **more):
    fixed = {**QUICK, **(fixed or {})}
    return make_plan(work, on or machine(), budgets(share_of_state, **more), fixed, batch_samples=batch)


def staying(plan):
    return plan.on_device_root, plan.on_device_blocks


def test_more_device_memory_keeps_more_and_makes_steps_shorter():
    plans = [planned(share) for share in (0.4, 0.5, 0.6, 0.9)]
    assert all(a.predicted.step_s >= b.predicted.step_s for a, b in itertools.pairwise(plans))
    numels = [streamed_by(plan, WORK).on_device_numel for plan in plans]
    assert numels == sorted(numels)
    assert numels[-1] > numels[0]
    without = planned(0.9, fixed={"states_on_device": 0})
    assert staying(without) == (False, 0)
    assert plans[-1].predicted.step_s < without.predicted.step_s


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("n_drives", [0, 2])
@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_the_simulator_moves_and_holds_what_the_plan_says(share, n_drives, clips):
    allowed = budgets(share, clips_gradients=clips)
    plan = make_plan(WORK, machine(n_drives=n_drives), allowed, QUICK, batch_samples=8)
    assert plan.on_device_root or plan.on_device_blocks
    step = simulate_plan(plan, WORK, machine(n_drives=n_drives), staging_nbytes=STAGING)
    predicted = plan.predicted
    assert step.h2d_nbytes == pytest.approx(predicted.bytes["h2d"], rel=1e-6)
    assert step.d2h_nbytes == pytest.approx(predicted.bytes["d2h"], rel=1e-6)
    assert step.peak_nbytes["device"] <= predicted.peak_nbytes["device"] <= allowed.device_nbytes
    assert step.step_s == pytest.approx(predicted.step_s, rel=0.15)


def test_what_stays_is_neither_loaded_nor_updated_by_the_cpu():
    plan = planned(0.9)
    operations, _ = unroll(plan, WORK, shares_host=False, device_update_s=1.0, n_steps=1)
    moved = {(o.kind, o.lane, o.block) for o in operations if o.amount or o.fixed_s}
    for block in range(plan.on_device_blocks):
        assert not moved & {("load", "h2d", block), ("grad_out", "d2h", block), ("update", "cpu", block)}
    streamed = range(plan.on_device_blocks, len(WORK.blocks))
    assert {block for kind, lane, block in moved if (kind, lane) == ("update", "cpu")} >= set(streamed)
    assert (("load", "h2d", None) in moved) == (not plan.on_device_root)
    made = [o.fixed_s for o in operations if (o.kind, o.lane) == ("update", "compute")]
    assert sum(made) == pytest.approx(1.0)
    assert len(made) == plan.on_device_blocks + plan.on_device_root


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_what_stays_takes_no_slot_and_leaves_none(share):
    plan = planned(share)
    assert plan.on_device_blocks > 0
    listing = Unroller(plan, WORK, shares_host=False, launch_overhead_s=0.0)
    for _ in range(3):
        listing.run_step()
        assert len(listing.free_slots) == plan.n_slots
        assert listing.resident == set()


def test_memory_of_unknown_speed_is_not_planned_with_and_slow_memory_has_less():
    assert staying(planned(0.9, machine(None))) == (False, 0)
    fast, slow = planned(0.9, machine(5e9)), planned(0.9, machine(1e7))
    assert streamed_by(slow, WORK).on_device_numel < streamed_by(fast, WORK).on_device_numel
    assert fast.predicted.exposed_seconds["device_update"] == pytest.approx(
        streamed_by(fast, WORK).on_device_numel / 5e9
    )


@pytest.mark.parametrize(
    "nothing",
    [
        {"on": small_machine(0, True)},
        {"durable_steps": True, "on": machine(n_drives=2)},
        {"work": replace(WORK, rule=kernel_rule("adamw", "bf16"))},
    ],
    ids=["shared memory", "durable", "bf16 moments"],
)
def test_where_no_state_can_stay_none_is_planned_and_asking_for_it_is_refused(nothing):
    assert staying(planned(0.9, **nothing)) == (False, 0)
    with pytest.raises(ConfigError, match="states_on_device"):
        planned(0.9, **nothing, fixed={"states_on_device": 10**6})


def test_what_is_asked_for_is_what_stays():
    scratch = 12 * max(WORK.root_stored_numel, WORK.blocks[0].stored_numel)
    plan = planned(0.9, fixed={"states_on_device": 10 * WORK.root_stored_numel + scratch})
    assert staying(plan) == (True, 0)
    with pytest.raises(ConfigError, match="bytes of device memory"):
        planned(0.9, fixed={"states_on_device": 0.5})


@pytest.mark.parametrize(("share_of_state", "n_blocks"), [(0.5, 0), (0.6, 1), (0.4, 0)])
def test_more_than_fits_is_refused_with_figures_that_do(share_of_state, n_blocks):
    asked = {"states_on_device": 2 * ROOM}
    with pytest.raises(BudgetError) as refused:
        planned(share_of_state, fixed=asked)
    said = str(refused.value)
    number, unit = re.search(r"device_memory='([\d.]+)(MB|GB)'", said).groups()
    device_nbytes = int(float(number) * {"MB": 10**6, "GB": 10**9}[unit])
    enough = planned(device_nbytes / ROOM, fixed=asked)
    assert staying(enough) == (True, 6)
    with pytest.raises(BudgetError):
        planned(0.99 * device_nbytes / ROOM, fixed=asked)
    most = int(re.search(r"states_on_device=(\d+)", said)[1])
    assert staying(planned(share_of_state, fixed={"states_on_device": most})) == (most > 0, n_blocks)
    block = blocks_of(WORK, SPLIT_MASTER)[0][0]
    if not most:
        return
    with pytest.raises(BudgetError):
        planned(share_of_state, fixed={"states_on_device": most + block.slot_nbytes + block.state_nbytes})


def test_no_block_stays_whose_gradients_need_larger_buffers_than_what_is_streamed():
    first = replace(WORK.blocks[0], trainable_numel=2 * WORK.blocks[0].trainable_numel)
    work = replace(WORK, blocks=(first, *WORK.blocks[1:]))
    assert staying(planned(0.9, work=work)) == (True, 0)
    last = replace(work, blocks=(*WORK.blocks[1:], first))
    assert planned(0.9, work=last).on_device_blocks > 0


def test_taking_out_what_stays_leaves_the_arithmetic_and_twice_is_as_good_as_once():
    stays = OnDevice(True, 3)
    once = streamed_workload(WORK, SPLIT_MASTER, stays, keeps_gradients=False)
    assert streamed_workload(once, SPLIT_MASTER, stays, keeps_gradients=False) == once
    assert once.numel == WORK.numel - once.on_device_numel == 5 * WORK.blocks[0].trainable_numel
    assert [b.flops_per_sample for b in once.blocks] == [b.flops_per_sample for b in WORK.blocks]
    kept = 3 * WORK.blocks[0].stored_numel
    gradients, largest = 4 * WORK.root_stored_numel, max(WORK.root_stored_numel, WORK.blocks[0].stored_numel)
    assert once.on_device_nbytes == 12 * once.on_device_numel + gradients + 3 * 4 * largest
    waiting = streamed_workload(WORK, SPLIT_MASTER, stays, keeps_gradients=True)
    assert waiting.on_device_nbytes == once.on_device_nbytes + 4 * kept


def test_frozen_blocks_that_stay_without_others_are_counted_and_not_loaded():
    frozen = replace(WORK.blocks[0], trainable_numel=0, frozen_numel=WORK.blocks[0].trainable_numel)
    work = replace(WORK, blocks=(frozen, frozen, *WORK.blocks[2:]))
    blocks, root = blocks_of(work, SPLIT_MASTER)
    room = 2 * blocks[0].slot_nbytes
    assert room < root.state_nbytes
    scratch = scratch_nbytes(max(b.grad_nbytes for b in [*blocks, root]))
    plan = planned(0.9, work=work, fixed={"states_on_device": room + scratch})
    assert staying(plan) == (False, 2)
    assert streamed_by(plan, work).on_device_nbytes == room
    step = simulate_plan(plan, work, machine(), staging_nbytes=STAGING)
    assert step.h2d_nbytes == pytest.approx(plan.predicted.bytes["h2d"], rel=1e-6)


def test_a_plan_says_so_survives_its_file_and_explains_itself():
    plan = planned(0.9, n := machine())
    assert Plan.from_json(plan.to_json()) == plan
    line = next(line for line in plan_lines(plan) if line.startswith("on the device"))
    assert "updated there" in line
    assert f"first {plan.on_device_blocks} block" in line
    why = explain(plan, WORK, n, budgets(0.9), QUICK)
    more = budgets(0.9)
    more = replace(more, device_memory_nbytes=more.device_memory_nbytes + 10**9)
    then = make_plan(WORK, n, more, QUICK, batch_samples=8)
    assert why.one_more_gb_device_s == pytest.approx(plan.predicted.step_s - then.predicted.step_s)


def test_a_plan_is_found_where_only_more_state_on_the_device_leaves_host_memory_enough():
    """Without drives host memory has to hold what does not stay: with two blocks more than there is, with six not."""
    on, room = machine(), 14 * sum(b.stored_numel for b in WORK.blocks[6:]) + 10 * WORK.numel // 4
    host = Budgets(4 * ROOM, room, staging_nbytes=STAGING)
    fixed = {**QUICK, "states_on_device": 4 * ROOM}
    assert make_plan(WORK, on, host, fixed, batch_samples=8).on_device_blocks == 6
    with pytest.raises(BudgetError):
        make_plan(WORK, on, host, {**QUICK, "states_on_device": 0}, batch_samples=8)
    with pytest.raises(BudgetError):
        make_plan(WORK, on, host, {**QUICK, "states_on_device": 12 * WORK.numel // 4}, batch_samples=8)
    assert make_plan(WORK, on, host, QUICK, batch_samples=8).on_device_blocks > 2


@pytest.mark.parametrize("n_drives", [0, 1])
def test_a_refusal_names_what_would_do_with_state_on_the_device(n_drives):
    """Where host memory is too small for what is streamed with nothing there, more device memory may do."""
    on = machine(n_drives=n_drives)
    plenty = Budgets(4 * ROOM, 4 * ROOM, staging_nbytes=STAGING)
    nothing = lower_bounds([Search(WORK, on, plenty, QUICK, 8)])
    every = [search for _, search in searches(WORK, on, plenty, QUICK, 8, in_any_room=True)]
    least = lower_bounds(every)
    assert least.host_memory_nbytes < nothing.host_memory_nbytes
    host_nbytes = nothing.host_memory_nbytes - 1
    with pytest.raises(BudgetError, match="device_memory='") as refused:
        make_plan(WORK, on, Budgets(ROOM // 5, host_nbytes, staging_nbytes=STAGING), QUICK, batch_samples=8)
    number, unit = re.search(r"device_memory='([\d.]+)(MB|GB)'", str(refused.value)).groups()
    enough = int(float(number) * {"MB": 10**6, "GB": 10**9}[unit])
    make_plan(WORK, on, Budgets(enough, host_nbytes, staging_nbytes=STAGING), QUICK, batch_samples=8)
    with pytest.raises(BudgetError):
        make_plan(
            WORK, on, Budgets(int(0.99 * enough), host_nbytes, staging_nbytes=STAGING), QUICK, batch_samples=8
        )

"""The list of operations of a step: complete, ordered, and close to what the planner expects."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from offload.planner.plan import Budgets
from offload.planner.rates import BusRates, Rates, rates_of
from offload.planner.search import make_plan
from offload.schedule.run import simulate_plan
from offload.schedule.simulator import duration_alone_s, simulate
from offload.schedule.unroll import unroll
from offload.types import GRAD_PARTS
from tests.planning import gpt, lohan_machine

WORK = gpt("13b", 40, 5120)


def plan_of(batch=16, drives=2, host_gb=64, fixed=None, work=WORK, shares_host=False):
    machine = lohan_machine(drives, host_gb).model_copy(update={"shares_host": shares_host})
    budgets = Budgets(machine.device_memory_nbytes, machine.host_memory_nbytes)
    return make_plan(work, machine, budgets, fixed, batch_samples=batch), machine


@pytest.mark.parametrize("update", ["backward", "deferred", "mixed"])
def test_a_step_computes_every_block_and_updates_it_once(update) -> None:
    fixed = {"deferred_fraction": 0.5} if update == "mixed" else {"update": update}
    plan, _ = plan_of(fixed=fixed)
    operations, ends = unroll(plan, WORK, shares_host=False)
    steady = [o for o in operations if o.step == 1]
    counts = Counter((o.kind, o.block) for o in steady)
    done = Counter[tuple[str, int | None]]()
    for operation in steady:
        done[operation.kind, operation.block] += operation.amount
    for block in range(40):
        assert counts["forward", block] == plan.micro_batches
        assert counts["update", block] == plan.update_pieces
        assert done["grad_out", block] == pytest.approx(plan.grad_nbytes * WORK.blocks[block].trainable_numel)
        assert done["backward", block] == pytest.approx(2 * done["forward", block])
    updated = sum(o.amount for o in steady if o.kind == "update")
    assert updated == pytest.approx(WORK.numel)
    assert len(ends) == 3


@pytest.mark.parametrize("update", ["backward", "deferred"])
@pytest.mark.parametrize("shares_host", [False, True])
def test_forward_waits_for_the_update_of_its_own_block(update, shares_host) -> None:
    """Through however many operations: no forward of step 1 can start before every piece of its block's last update."""
    work = gpt("small", 4, 128, tokens=64, vocab=200)
    plan, _ = plan_of(4, 1, 1, {"update": update}, work, shares_host)
    operations, _ = unroll(plan, work, shares_host=shares_host)
    before: list[set[int]] = []
    for operation in operations:
        before.append(set().union(*(before[a] | {a} for a in operation.after)))
    for index, operation in enumerate(operations):
        if operation.kind == "forward" and operation.step == 1:
            pieces = {
                i
                for i, o in enumerate(operations[:index])
                if o.kind == "update" and o.block == operation.block and i < index
            }
            assert pieces
            assert pieces <= before[index]


def test_the_simulated_root_is_within_what_the_plan_counts_for_it():
    """With several micro-batches a batch's boundary is counted beside a block's backward; the root has its room."""
    traced = tuple(replace(b, working=((0, 40 * b.input_nbytes_per_sample),)) for b in WORK.blocks[:6])
    work = replace(WORK, blocks=traced, root_working=((0, 100 * WORK.blocks[0].input_nbytes_per_sample),))
    fixed = {"micro_batches": 4, "activations": "recompute", "inputs": "device"}
    plan, machine = plan_of(8, 1, 64, fixed, work, shares_host=True)
    assert simulate_plan(plan, work, machine).peak_nbytes["device"] <= plan.predicted.peak_nbytes["device"]


def test_no_deferred_update_starts_before_the_step_has_closed() -> None:
    """The global norm is known only after the last backward."""
    plan, _ = plan_of(fixed={"update": "deferred"})
    operations, ends = unroll(plan, WORK, shares_host=False)
    for operation in operations:
        if operation.kind == "update" and operation.block is not None:
            assert ends[operation.step - 1] in operation.after


@pytest.mark.parametrize(
    ("batch", "drives", "host_gb", "fixed"),
    [
        (8, 1, 64, {}),
        pytest.param(16, 2, 64, {}, marks=pytest.mark.slow),
        pytest.param(32, 12, 128, {}, marks=pytest.mark.slow),
        pytest.param(48, 3, 256, {}, marks=pytest.mark.slow),
        (48, 12, 768, {}),
        pytest.param(64, 12, 256, {"update": "deferred"}, marks=pytest.mark.slow),
    ],
)
def test_the_simulated_step_is_what_the_planner_expects_within_a_tenth(batch, drives, host_gb, fixed) -> None:
    plan, machine = plan_of(batch, drives, host_gb, fixed)
    step = simulate_plan(plan, WORK, machine)
    assert step.step_s == pytest.approx(plan.predicted.step_s, rel=0.10)
    assert step.step_s >= plan.predicted.lower_bound_s
    busy = step.busy_s["compute"] + sum(step.stall_s.values())
    assert busy == pytest.approx(step.step_s, rel=1e-6)


@pytest.mark.parametrize(
    "fixed", [{"inputs": "storage"}, {"update": "deferred", "grads_host_fraction": 1.0}], ids=str
)
def test_nothing_is_computed_while_the_thread_that_computes_makes_copies(fixed) -> None:
    """Where the device tier is DRAM nobody else would make them."""
    work = gpt("small", 4, 128, tokens=64, vocab=200)
    plan, machine = plan_of(4, 1, 1, {"micro_batches": 2, **fixed}, work, True)
    operations, _ = unroll(plan, work, shares_host=True)
    timeline = simulate(operations, rates_of(machine, work.param_nbytes))
    own = [i for i, o in enumerate(operations) if o.lane in ("compute", "h2d", "d2h") and o.amount]
    copies = {operations[i].kind for i in own if operations[i].lane != "compute"}
    assert copies == ({"swap_out", "swap_in"} if "inputs" in fixed else {"grad_out"})
    own.sort(key=lambda i: (timeline.start_s[i], timeline.end_s[i]))
    for before, after in pairwise(own):
        assert timeline.end_s[before] <= timeline.start_s[after] + 1e-12


def test_recomputing_pays_for_other_work_than_products_however_few_of_these_it_makes() -> None:
    """Products at 100 FLOP/s, a whole forward at 40: 1/40 - 1/100 = 0.015 s a FLOP of it is something else."""
    work = gpt("small", 4, 128, tokens=64, vocab=200)
    flops = work.blocks[0].flops_per_sample
    rates = Rates(
        100.0, BusRates(1.0, 1.0, 1.0, 1.0), None, 1.0, 1.0, True, work_flops_per_s={"recompute": 40.0}
    )
    for fixed, made_again in (({"activations": "keep"}, 0.0), ({"activations": "recompute"}, None)):
        plan, _ = plan_of(2, 1, 1, {"micro_batches": 1, **fixed}, work, True)
        operations, _ = unroll(plan, work, shares_host=True)
        first = next(o for o in operations if o.kind == "recompute")
        assert made_again is None or first.amount == made_again
        expected_s = first.amount / 100 + 2 * flops * 0.015
        assert duration_alone_s(first, rates) == pytest.approx(expected_s)


def test_endurance_counts_written_bytes_over_all_drives() -> None:
    plan, machine = plan_of(16, 4, 64)
    step = simulate_plan(plan, WORK, machine)
    assert step.endurance_steps == pytest.approx(4 * 7e15 / step.written_nbytes)
    assert step.endurance_years == pytest.approx(step.endurance_steps * step.step_s / (365.25 * 86400))


@pytest.mark.parametrize("shares_host", [False, True])
def test_an_untied_head_is_updated_while_the_blocks_go_backward(shares_host) -> None:
    work = replace(gpt("small", 4, 128, tokens=64, vocab=200), root_early_numel=20_000)
    plan, machine = plan_of(4, 1, 1, {"update": "backward", "states_host_fraction": 0.0}, work, shares_host)
    operations, _ = unroll(plan, work, shares_host=shares_host)
    updates = [o for o in operations if o.kind == "update" and o.block is None and o.step == 1]
    assert sum(o.amount for o in updates) == pytest.approx(work.root_stored_numel)
    first_block = next(
        i for i, o in enumerate(operations) if o.kind == "backward" and o.step == 1 and o.block == 3
    )
    before = [o for o in operations[:first_block] if o in updates]
    assert sum(o.amount for o in before) == pytest.approx(20_000)
    step = simulate_plan(plan, work, machine)
    for lane, nbytes in (("read", step.read_nbytes), ("written", step.written_nbytes)):
        assert plan.predicted.bytes[lane] == pytest.approx(nbytes, rel=0.02)
    late, _ = plan_of(4, 1, 1, {"update": "deferred"}, work, shares_host)
    waiting, _ = unroll(late, work, shares_host=shares_host)
    assert not [o for o in waiting if o.kind == "update" and o.block is None and o.amount == 20_000 / 16]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_leave_the_only_buffer_as_they_come_and_the_next_take_their_place(micro_batches) -> None:
    """Each part after what computes it, and before the same part of the next block is computed; no part twice."""
    fixed = {"grad_buffers": 1, "micro_batches": micro_batches, "update": "deferred"}
    plan, _ = plan_of(12, fixed=fixed)
    operations, _ = unroll(plan, WORK, shares_host=False, launch_overhead_s=1e-3)
    for block in range(1, 40):
        leaves = [
            i for i, o in enumerate(operations) if o.step == 1 and o.block == block and o.kind == "grad_out"
        ]
        last, first = (
            [
                i
                for i, o in enumerate(operations)
                if o.step == 1 and o.kind == "backward" and (o.block, o.micro_batch) == wanted
            ]
            for wanted in ((block, micro_batches - 1), (block - 1, 0))
        )
        assert len(leaves) == len(last) == len(first) == GRAD_PARTS
        for computed, left, next_computed in zip(last, leaves, first, strict=True):
            assert computed in operations[left].after
            assert left in operations[next_computed].after
        assert leaves[-1] not in operations[first[0]].after
        assert sum(operations[i].fixed_s for i in last) == pytest.approx(
            1e-3
        )  # a micro-batch is launched once

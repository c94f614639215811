"""Plans know what the runtime does: parameters that stay, gradients that come once, the held update, durable steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.errors import BudgetError
from offload.planner.hardware import Drive, Hardware
from offload.planner.memory import Shape, activation_staging_nbytes, device_need
from offload.planner.placement import BlockBytes, place
from offload.planner.plan import SPLIT_MASTER, Budgets
from offload.planner.search import make_plan
from offload.schedule.run import simulate_plan
from offload.schedule.unroll import unroll
from tests.conftest import slow_but
from tests.planning import gpt, lohan_machine

LAYERS = 8
WORK = gpt("small", LAYERS, 256, tokens=64, vocab=200)
BLOCK_NUMEL = sum(b.trainable_numel for b in WORK.blocks)
ROOT_NUMEL = WORK.root_trainable_numel
PLENTY = Budgets(10**9, 10**9, staging_nbytes=100_000)
ALL_ON_STORAGE = {
    "micro_batches": 1,
    "update": "backward",
    "params_host_fraction": 0.0,
    "states_host_fraction": 0.0,
}


def machine(*, shares_host: bool = True, drive_bytes_per_s: float = 1e9) -> Hardware:
    drive = Drive(read_bytes_per_s=drive_bytes_per_s, write_bytes_per_s=drive_bytes_per_s)
    return lohan_machine(1).model_copy(
        update={
            "shares_host": shares_host,
            "matmul_flops_per_s": {"bfloat16": 3e11},
            "adam_params_per_s": 5e8,
            "dram_bytes_per_s": 16e9,
            "drives": (drive,),
        }
    )


def plan_of(fixed, *, budgets=PLENTY, here=None, work=WORK, batch=2):
    return make_plan(work, here or machine(), budgets, {**ALL_ON_STORAGE, **fixed}, batch_samples=batch)


@pytest.mark.parametrize(
    ("slots", "params_host", "stay"), [(8, 0.0, True), (7, 0.0, False), (4, 0.5, True), (3, 0.5, False)]
)
def test_parameters_with_a_slot_for_every_block_are_never_moved(slots, params_host, stay) -> None:
    """10 bytes a parameter each way instead of 12 and 14; blocks in host memory need no slot."""
    plan = plan_of({"prefetch_blocks": slots - 1, "params_host_fraction": params_host})
    assert plan.params_on_device == stay
    step = simulate_plan(plan, WORK, machine())
    states = 10 * (BLOCK_NUMEL + ROOT_NUMEL)
    stored = 0 if stay else 2 * (1 - params_host) * BLOCK_NUMEL
    assert step.written_nbytes == pytest.approx(states + stored)
    assert plan.predicted.bytes["written"] == pytest.approx(step.written_nbytes)
    assert plan.predicted.bytes["read"] == pytest.approx(step.read_nbytes)
    assert (step.read_nbytes == pytest.approx(states)) == stay
    assert plan.written_nbytes_per_step(WORK) == pytest.approx(step.written_nbytes)


def test_without_storage_parameters_are_in_host_memory() -> None:
    plan = make_plan(WORK, machine(), replace(PLENTY, storage_nbytes=0), batch_samples=2)
    assert all(plan.params_in_host)
    assert not plan.params_on_device


def test_a_device_of_its_own_always_gets_parameters_over_the_bus() -> None:
    plan = plan_of({"prefetch_blocks": LAYERS - 1}, here=machine(shares_host=False))
    assert not plan.params_on_device


@pytest.mark.parametrize(
    ("fixed", "work", "width"),
    [
        ({}, WORK, 2),
        ({"micro_batches": 2}, WORK, 4),
        ({"update": "deferred"}, WORK, 4),
        ({}, replace(WORK, one_dtype=False), 4),
        ({}, gpt("small", LAYERS, 256, tokens=64, vocab=200, width=4), 4),
    ],
    ids=["once", "micro-batches", "deferred", "two dtypes", "fp32"],
)
def test_gradients_that_come_once_leave_in_half_the_bytes(fixed, work, width) -> None:
    here = machine(shares_host=False).model_copy(
        update={"matmul_flops_per_s": {"bfloat16": 3e11, "float32": 3e11}}
    )
    plan = plan_of(
        {"boundary_on_device": True, "inputs": "device", "activations": "recompute", **fixed},
        here=here,
        work=work,
    )
    step = simulate_plan(plan, work, here)
    assert plan.grads_once == (width == 2)
    assert step.d2h_nbytes == pytest.approx(width * BLOCK_NUMEL + 4 * ROOT_NUMEL)
    assert plan.predicted.bytes["d2h"] == pytest.approx(step.d2h_nbytes)


def held_plan(**more):
    return plan_of({"prefetch_blocks": LAYERS - 1, "grad_buffers": 2, "activations": "recompute", **more})


def test_the_update_of_the_last_block_but_one_is_held_until_backward_has_ended() -> None:
    plan = held_plan()
    assert plan.held_blocks == (LAYERS - 2,)
    operations, ends = unroll(plan, WORK, shares_host=True)
    for step in (0, 1):
        last_backward = ends[step]
        held = [
            i
            for i, o in enumerate(operations)
            if o.kind == "update" and o.block == LAYERS - 2 and o.step == step
        ]
        others = [
            i
            for i, o in enumerate(operations)
            if o.kind == "update" and o.block == LAYERS - 1 and o.step == step
        ]
        assert min(held) > last_backward > min(others)


@pytest.mark.parametrize(
    "fixed",
    [{"grad_buffers": 1}, {"prefetch_blocks": 2}, {"states_host_fraction": 1.0}, {"update": "deferred"}],
    ids=str,
)
def test_without_memory_of_its_own_or_bytes_to_move_none_is_held(fixed) -> None:
    assert held_plan(**fixed).held_blocks == ()


def test_holding_shortens_a_step_that_storage_limits() -> None:
    here = machine(drive_bytes_per_s=5e8)
    plan = make_plan(
        WORK,
        here,
        PLENTY,
        {**ALL_ON_STORAGE, "prefetch_blocks": LAYERS - 1, "grad_buffers": 2},
        batch_samples=8,
    )
    assert plan.held_blocks == (LAYERS - 2,)
    at_once = simulate_plan(plan.model_copy(update={"held_blocks": ()}), WORK, here)
    held = simulate_plan(plan, WORK, here)
    assert held.step_s < at_once.step_s
    assert held.written_nbytes == pytest.approx(at_once.written_nbytes)


@pytest.mark.parametrize("states_host", [0.0, 1.0])
def test_durable_steps_write_all_state_and_keep_it_twice(states_host) -> None:
    """docs/durability.md: 12 bytes a parameter written whatever host memory holds, the root's parameters among them."""
    budgets = replace(PLENTY, durable_steps=True)
    plan = plan_of({"states_host_fraction": states_host}, budgets=budgets)
    step = simulate_plan(plan, WORK, machine())
    numel = BLOCK_NUMEL + ROOT_NUMEL
    assert step.written_nbytes == pytest.approx(12 * numel)
    assert plan.predicted.bytes["written"] == pytest.approx(step.written_nbytes)
    assert plan.written_nbytes_per_step(WORK) == 12 * numel
    assert (
        24 * numel < plan.predicted.peak_nbytes["storage"] == step.peak_nbytes["storage"] < 24 * numel + 3e6
    )


def test_durable_steps_that_do_not_fit_the_free_bytes_are_refused_and_others_are_not() -> None:
    free = 18 * (BLOCK_NUMEL + ROOT_NUMEL)
    plan_of({}, budgets=replace(PLENTY, storage_nbytes=free))
    with pytest.raises(BudgetError, match="of storage"):
        plan_of({}, budgets=replace(PLENTY, storage_nbytes=free, durable_steps=True))


def test_with_durable_steps_clipping_may_discard_instead_of_waiting() -> None:
    budgets = replace(PLENTY, durable_steps=True, clips_gradients=True)
    assert plan_of({"update": "backward"}, budgets=budgets).update == "backward"


def test_staging_for_activations_is_set_aside_only_where_some_go_to_storage() -> None:
    fixed = {"inputs": "device", "activations": "recompute"}
    plan = plan_of(fixed, budgets=replace(PLENTY, host_memory_nbytes=100_000 + (128 << 10)))
    assert "storage" not in {outcome for block in plan.activations for outcome in block.values()}
    assert (
        simulate_plan(plan, WORK, machine(), staging_nbytes=100_000).peak_nbytes["host"]
        == plan.predicted.peak_nbytes["host"]
    )
    widest = max(sum(block.nbytes_by_tensor().values()) for block in WORK.blocks)
    with pytest.raises(BudgetError):
        plan_of(
            {**fixed, "inputs": "storage"},
            budgets=replace(PLENTY, host_memory_nbytes=activation_staging_nbytes(2 * widest)),
        )


def by_budget(device_nbytes, host_nbytes, deferred):
    """Fixed choices that say what `placement.place` makes of the same budgets."""
    blocks = [
        BlockBytes(2 * b.trainable_numel, (10 * b.trainable_numel // 4,) * 4, 4 * b.trainable_numel)
        for b in WORK.blocks
    ]
    root = BlockBytes(2 * ROOT_NUMEL, (10 * ROOT_NUMEL,), 4 * ROOT_NUMEL)
    placed = place(
        blocks, root, device_nbytes=device_nbytes, host_nbytes=host_nbytes, staging_nbytes=100_000, has_storage=True,
        deferred=deferred, prefetch_blocks=None, grads_per_buffer=1 if deferred else 2,
    )  # fmt: skip
    states = sum(
        10 * b.trainable_numel // 4 * n for b, n in zip(WORK.blocks, placed.host_chunks, strict=False)
    )
    return {
        "micro_batches": 1,
        "update": "deferred" if deferred else "backward",
        "prefetch_blocks": placed.n_slots - 1,
        "grad_buffers": placed.n_grad_buffers,
        "params_host_fraction": sum(placed.params_in_host) / LAYERS,
        "grads_host_fraction": sum(placed.grads_in_host) / LAYERS,
        "states_host_fraction": states / (10 * (BLOCK_NUMEL + ROOT_NUMEL)),
        "activations": "recompute",
    }


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("drive_bytes_per_s", slow_but([3e9], [3e8, 3e9]))
def test_no_plan_is_slower_in_the_simulation_than_placement_by_budget(deferred, drive_bytes_per_s) -> None:
    """At equal memory for state: the planner counts working memory besides, placement by budget does not."""
    here = machine(drive_bytes_per_s=drive_bytes_per_s)
    slot = 2 * WORK.blocks[0].trainable_numel
    for n_slots in (3, 5, 14):
        for host_mb in (0.5, 30):
            device, host = 6 * ROOT_NUMEL + n_slots * 2 * slot, int(host_mb * 1e6)
            shape = Shape(1, 2, 1, True)
            need = device_need(WORK, SPLIT_MASTER, 2, shape, shares_host=True)
            working = (
                need.working
                + need.boundary
                + need.logits
                + 2 * sum(b.input_nbytes_per_sample for b in WORK.blocks)
            )
            choices = {"update": "deferred" if deferred else "backward", "micro_batches": 1}
            budgets = replace(
                PLENTY, device_memory_nbytes=device + working, host_memory_nbytes=host + (1 << 20)
            )
            planned = make_plan(WORK, here, budgets, choices, batch_samples=2)
            unplanned = make_plan(WORK, here, PLENTY, by_budget(device, host, deferred), batch_samples=2)
            steps = [simulate_plan(plan, WORK, here).step_s for plan in (planned, unplanned)]
            assert steps[0] <= 1.03 * steps[1], (n_slots, host_mb, steps)

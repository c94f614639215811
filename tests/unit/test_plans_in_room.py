"""What backward keeps where state is placed already: there is always a plan, and it is no worse than none."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planner.hardware import load_hardware
from offload.planner.in_room import Room, plans_in_room
from offload.planner.memory import DeviceNeed, Shape, device_need
from offload.planner.placement import BlockBytes, Placement, place
from offload.planner.plan import INPUT, Budgets, Plan, state_format_of
from offload.planner.search import make_plan
from offload.schedule.fastest import ALIKE, fastest
from offload.schedule.run import simulate_plan
from offload.types import PAGE_NBYTES
from tests.planning import STAGING, gpt, lohan_machine, small_machine

GB = 10**9
CHUNK = 1 << 18


def quick(test):
    return settings(
        max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )(test)


def placed_plan(work, batch: int, micro_batches: int, **more) -> Plan:
    """A run of this model whose state is all on storage, unless `more` says otherwise."""
    n = len(work.blocks)
    facts = {
        "n_slots": 2, "n_grad_buffers": 1, "deferred_blocks": (), "params_in_host": (False,) * n,
        "grads_in_host": (False,) * n, "states_in_host": (0.0,) * (n + 1), "activation_staging_nbytes": 128 << 10,
    }  # fmt: skip
    return Plan(
        model=work.name, hardware="", batch_samples=batch, tokens_per_sample=work.tokens_per_sample,
        state_format=state_format_of(work), micro_batches=micro_batches, boundary_on_device=True,
        activations=({},) * n, **{**facts, **more},
    )  # fmt: skip


def need_of(base: Plan, work, machine) -> DeviceNeed:
    shape = Shape(base.micro_batches, base.n_slots, base.n_grad_buffers, True)
    return device_need(work, base.state_format, base.batch_samples, shape, shares_host=machine.shares_host)


def working_nbytes(base: Plan, work, machine) -> int:
    """Device memory beside parameters and gradients, of the blocks or of the root."""
    need = need_of(base, work, machine)
    return need.working + need.boundary + need.logits


def nbytes_in(plan: Plan, work, tier: str, only_inputs: bool = False) -> int:
    return plan.batch_samples * sum(
        block.nbytes_by_tensor()[name]
        for block, outcomes in zip(work.blocks, plan.activations, strict=True)
        for name, outcome in outcomes.items()
        if outcome == tier and (name == INPUT or not only_inputs)
    )


@st.composite
def runs(draw):
    """(workload, machine, the run as it is placed, its room): from next to nothing to plenty."""
    work = gpt("small", draw(st.integers(1, 6)), 64, tokens=draw(st.sampled_from([16, 64])), vocab=200)
    machine = small_machine(draw(st.integers(1, 2)), draw(st.booleans()))
    batch = draw(st.integers(1, 6))
    base = placed_plan(work, batch, draw(st.integers(1, batch)))
    everything = batch * sum(sum(b.nbytes_by_tensor().values()) for b in work.blocks)
    working = working_nbytes(base, work, machine)
    device = working + int(everything * draw(st.floats(0, 1.2)))
    room = Room(
        device_nbytes=device,
        device_unplanned_nbytes=device if machine.shares_host else device // 2,
        host_nbytes=int(everything * draw(st.sampled_from([0.0, 0.05, 0.3, 1.5]))),
        has_storage=True,
        host_inputs_nbytes=draw(
            st.sampled_from([0, batch * work.blocks[0].input_nbytes_per_sample + PAGE_NBYTES])
        ),
    )
    return work, machine, base, room


def stored_without_a_plan(work, batch: int, room: Room, shares_host: bool) -> int:
    """Bytes of block inputs that find no room in memory, each in turn."""
    device, host, stored = room.device_unplanned_nbytes, room.host_nbytes + room.host_inputs_nbytes, 0
    for block in work.blocks:
        nbytes = batch * block.input_nbytes_per_sample
        paged = nbytes if shares_host else nbytes + PAGE_NBYTES
        if nbytes <= device:
            device -= nbytes
        elif paged <= host:
            host -= paged
        else:
            stored += nbytes
    return stored


# ---- the case this is for -------------------------------------------------------------------------------------


def placed_by_budget(work, device_nbytes: int, host_nbytes: int) -> tuple[Placement, list[BlockBytes]]:
    def chunks(nbytes: int) -> tuple[int, ...]:
        whole, rest = divmod(nbytes, 10 * CHUNK)
        return (10 * CHUNK,) * whole + ((rest,) if rest else ())

    blocks = [
        BlockBytes(2 * b.trainable_numel, chunks(10 * b.trainable_numel), 4 * b.trainable_numel)
        for b in work.blocks
    ]
    root = work.root_trainable_numel
    found = place(
        blocks, BlockBytes(2 * root, chunks(10 * root), 4 * root), device_nbytes=device_nbytes,
        host_nbytes=host_nbytes, staging_nbytes=STAGING, has_storage=True, deferred=False, prefetch_blocks=2,
        shares_host=False,
    )  # fmt: skip
    return found, blocks


@pytest.mark.parametrize("host_gb", [2, 10])
def test_a_run_whose_inputs_do_not_fit_in_memory_has_a_plan_though_the_search_by_budgets_has_none(host_gb):
    """A model of 1.3 B parameters, 131072 tokens a step, on an H100 within 10 GB of device memory."""
    work, hardware, batch = gpt("1.3b", 24, 2048), load_hardware("h100"), 128
    device, host, micro = 10 * GB, host_gb * GB, 16
    placement, blocks = placed_by_budget(work, device, host)
    fixed = {
        "boundary_on_device": True, "micro_batches": micro, "update": "backward",
        "prefetch_blocks": placement.n_slots - 1, "grad_buffers": placement.n_grad_buffers,
        "params_host_fraction": sum(placement.params_in_host) / len(blocks), "states_host_fraction": 0.0,
        "activations_host_fraction": 1.0,
    }  # fmt: skip
    with pytest.raises(BudgetError):
        make_plan(work, hardware, Budgets(device, host, staging_nbytes=STAGING), fixed, batch_samples=batch)
    states = [
        sum(b.state_chunk_nbytes[:n]) / b.state_nbytes
        for b, n in zip(blocks, placement.host_chunks, strict=False)
    ]
    base = placed_plan(
        work, batch, micro, n_slots=placement.n_slots, n_grad_buffers=placement.n_grad_buffers,
        params_in_host=tuple(placement.params_in_host), states_in_host=(*states, 0.0),
        activation_staging_nbytes=placement.activation_staging_nbytes,
    )  # fmt: skip
    left = device - placement.device_nbytes
    room = Room(left, left // 2, host - placement.host_nbytes, has_storage=True)
    inputs_nbytes = batch * sum(b.input_nbytes_per_sample for b in work.blocks)
    assert inputs_nbytes > left + room.host_nbytes
    plans = plans_in_room(base, work, hardware, room)
    unplanned = plans[-1]
    plan = fastest(plans, work, hardware, staging_nbytes=STAGING)
    assert 0 < nbytes_in(plan, work, "storage") <= nbytes_in(unplanned, work, "storage")
    steps = [simulate_plan(p, work, hardware, staging_nbytes=STAGING).step_s for p in (plan, unplanned)]
    assert steps[0] <= steps[1] * (1 + ALIKE)


# ---- promises -------------------------------------------------------------------------------------------------


@quick
@pytest.mark.slow
@given(runs())
def test_where_what_computes_has_room_the_simulated_step_is_not_longer_than_without_a_plan(run):
    work, machine, base, room = run
    plans = plans_in_room(base, work, machine, room)
    plan = fastest(plans, work, machine, staging_nbytes=STAGING)
    steps = [simulate_plan(p, work, machine, staging_nbytes=STAGING).step_s for p in (plan, *plans)]
    assert all(steps[0] <= other * (1 + ALIKE) for other in steps)


@quick
@given(runs())
def test_storage_gets_block_inputs_alone_and_never_more_than_without_a_plan(run):
    work, machine, base, room = run
    *plans, unplanned = plans_in_room(base, work, machine, room)
    stored = stored_without_a_plan(work, base.batch_samples, room, machine.shares_host)
    assert nbytes_in(unplanned, work, "storage") == stored
    for plan in plans:
        assert (
            nbytes_in(plan, work, "storage") == nbytes_in(plan, work, "storage", only_inputs=True) <= stored
        )


@quick
@given(runs())
def test_tensors_that_are_kept_fit_beside_what_computes_and_what_inputs_have_had_before(run):
    work, machine, base, room = run
    *plans, unplanned = plans_in_room(base, work, machine, room)
    counted = room.device_nbytes - working_nbytes(base, work, machine)
    had = nbytes_in(unplanned, work, "device")
    for plan in plans:
        kept, inputs = nbytes_in(plan, work, "device"), nbytes_in(plan, work, "device", only_inputs=True)
        assert inputs <= max(counted, had)
        assert kept == inputs or kept <= counted
        returning = {outcomes[INPUT] for outcomes in plan.activations} - {"device"}
        if "storage" in returning or (returning and not machine.shares_host):
            need, one = (
                need_of(base, work, machine),
                base.batch_samples * work.blocks[0].input_nbytes_per_sample,
            )
            beside = room.device_nbytes - need.working - need.boundary - 2 * one
            assert inputs <= max(beside, had)
            assert kept == inputs or kept <= beside
        assert nbytes_in(plan, work, "host") <= room.host_nbytes + room.host_inputs_nbytes


@pytest.mark.parametrize("shares_host", [True, False])
def test_with_room_for_everything_nothing_is_computed_again(shares_host):
    work, machine = gpt("small", 4, 64, tokens=64, vocab=200), small_machine(1, shares_host)
    base = placed_plan(work, 4, 1, n_grad_buffers=2, params_in_host=(True,) * 4, states_in_host=(1.0,) * 5)
    plan = plans_in_room(base, work, machine, Room(GB, GB // 2, 0, has_storage=True))[0]
    again = {t.name for t in work.blocks[0].saved if t.recompute_flops_per_sample}
    assert {outcomes[name] for outcomes in plan.activations for name in again} == {"device"}


def test_the_predicted_step_is_that_of_the_search_by_budgets_where_both_choose_alike():
    work, machine = gpt("1.3b", 24, 2048), lohan_machine(2)
    budgets = Budgets(40 * GB, 64 * GB, staging_nbytes=STAGING)
    fixed = {"activations": "recompute", "boundary_on_device": True, "inputs": "device", "update": "deferred"}
    searched = make_plan(work, machine, budgets, fixed, batch_samples=16)
    base = searched.model_copy(update={"activations": ({},) * 24, "predicted": None})
    room = Room(30 * GB, 30 * GB, 0, has_storage=True)
    unplanned = plans_in_room(base, work, machine, room)[-1]
    assert unplanned.activations == searched.activations
    assert unplanned.predicted.step_s == pytest.approx(searched.predicted.step_s, rel=1e-9)
    assert unplanned.predicted.bytes == pytest.approx(searched.predicted.bytes, rel=1e-9)


@pytest.mark.parametrize("tier", ["device", "host", "storage"])
def test_block_inputs_wait_where_the_user_wants_them(tier):
    work, machine = gpt("small", 4, 64, tokens=64, vocab=200), small_machine(1, False)
    plans = plans_in_room(
        placed_plan(work, 4, 2), work, machine, Room(GB, GB // 2, GB, has_storage=True), tier
    )
    assert {outcomes[INPUT] for plan in plans for outcomes in plan.activations} == {tier}


def test_a_device_that_does_not_hold_what_computes_is_refused_with_both_figures():
    work, machine = gpt("small", 4, 64, tokens=64, vocab=200), small_machine(1, False)
    base = placed_plan(work, 4, 2)
    working = working_nbytes(base, work, machine)
    with pytest.raises(BudgetError, match=rf"{working / 1e9:.3g} GB .* {(working - 1) / 1e9:.3g} GB"):
        plans_in_room(base, work, machine, Room(working - 1, 0, GB, has_storage=True))
    assert plans_in_room(base, work, machine, Room(working, 0, GB, has_storage=True))


def test_swapping_that_only_the_formulas_find_faster_is_not_chosen():
    """A few wide tensors cross a slow bus at once: the formulas spread them over the phase, the device waits."""
    work = gpt("1.3b", 24, 2048)
    hardware = load_hardware("h100").model_copy(update={"h2d_bytes_per_s": 15e9, "d2h_bytes_per_s": 15e9})
    base = placed_plan(work, 32, 4, n_grad_buffers=2, params_in_host=(True,) * 24, states_in_host=(1.0,) * 25)
    room = Room(6 * GB, 3 * GB, 12 * GB, has_storage=True)
    swapping, *others = plans_in_room(base, work, hardware, room)
    plan = fastest([swapping, *others], work, hardware, staging_nbytes=STAGING)
    steps = [simulate_plan(p, work, hardware, staging_nbytes=STAGING).step_s for p in (swapping, plan)]
    assert swapping.predicted.step_s < min(p.predicted.step_s for p in others)
    assert steps[1] < 0.95 * steps[0]

"""Over a bus the updates of the last blocks give way to others where their gradients have host memory to wait in."""

from dataclasses import replace

import pytest
import torch

from offload.planner.plan import Budgets
from offload.planner.search import make_plan
from offload.runtime import host_slots, scheduler
from offload.runtime.device_residency import CopiedResidency
from offload.runtime.gradients import Gradients
from offload.schedule.held import held_nbytes
from offload.schedule.run import simulate_plan
from offload.schedule.unroll import unroll
from tests.cuda import CUDA
from tests.integration.test_run_ahead import N_BLOCKS, accumulating_from_third, once, same, trained
from tests.integration.test_waiting_gradients import accumulate, spare, wrapped
from tests.planning import gpt, small_machine

IN_HOST = {"prefetch_blocks": 1, "device_memory": "8MB"}


@pytest.fixture
def updates(monkeypatch):
    """(block, whether it gives way to others) of the updates of blocks, as they are submitted."""
    seen = []

    def noted(block, part, **more):
        if not block.is_root:
            seen.append((block.index, block.gives_way))
        return make_job(block, part, **more)

    make_job = scheduler.make_job
    monkeypatch.setattr(scheduler, "make_job", noted)
    return seen


@pytest.mark.parametrize("step_of", [once, accumulating_from_third])
@pytest.mark.parametrize("device", ["emulated", CUDA], indirect=True)
def test_those_of_the_last_blocks_do_and_the_numbers_are_those_of_deferred_ones(
    tmp_path, updates, device, step_of
):
    found, _ = trained(tmp_path, "backward", step_of, device=device, **IN_HOST, host_memory="8MB")
    gave_way = {index for index, gives_way in updates if gives_way}
    assert gave_way
    assert gave_way == set(range(min(gave_way), N_BLOCKS))
    updates.clear()
    deferred, _ = trained(tmp_path, "deferred", step_of, device=device, **IN_HOST, host_memory="8MB")
    assert not any(gives_way for _, gives_way in updates)
    assert same(found, deferred)


def test_no_load_that_waits_for_an_update_goes_before_that_of_a_block_needed_earlier(tmp_path, monkeypatch):
    """Loads start one after the other; the block in backward is the first of the next forward, and comes back then."""
    early, calls, backward = [], [], []
    load, begin = CopiedResidency.load, scheduler.Scheduler.begin

    def noted(self, block, order, *, must, **more):
        if not must and block.tickets:
            calls.append(block.index)
            early.extend(block.index for index in backward if index < block.index)
        return load(self, block, order, must=must, **more)

    def begins(self, block, phase, **more):
        backward[:] = [block.index] if phase == "backward" else []
        begin(self, block, phase, **more)
        backward.clear()

    monkeypatch.setattr(scheduler.Scheduler, "begin", begins)
    monkeypatch.setattr(host_slots.HostSlots, "settle", lambda self, block: None)
    monkeypatch.setattr(CopiedResidency, "load", noted)
    trained(tmp_path, "backward", once, device="emulated", **IN_HOST, host_memory="8MB")
    assert calls
    assert early == []


def test_without_host_memory_to_spare_none_does(updates):
    model, _ = wrapped()
    placed = model.offload.placement
    least = placed.host_nbytes - (placed.n_host_grad_buffers - 2) * grad_nbytes()
    model.offload.close()
    model, optimizer = wrapped(host_memory=least)
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    model.offload.close()
    assert updates
    assert not any(gives_way for _, gives_way in updates)


def grad_nbytes():
    """Of a block of `wrapped`, in fp32, in whole segments as the buffers have them."""
    model, _ = wrapped()
    (nbytes,) = {buffer.plane.nbytes for buffer in model.offload.parts.out_buffers}
    model.offload.close()
    return nbytes


def test_gradients_that_wait_for_more_take_their_memory_before_host_memory_runs_out():
    """Four blocks' gradients have to wait. Half of what is left is for held updates, two blocks'; those that wait get
    the other half, and then these."""
    model, _ = wrapped()
    placed, nbytes = model.offload.placement, grad_nbytes()
    model.offload.close()
    enough = placed.host_nbytes - (placed.n_host_grad_buffers - 2) * nbytes + 4 * nbytes + 4 * 4096
    model, _ = wrapped(host_memory=enough)
    assert len(model.offload.parts.out_buffers) == 4
    assert spare(model) < 4 * nbytes
    accumulate(model)
    assert all(block.grads_waiting for block in model.offload.blocks)
    assert len(model.offload.parts.out_buffers) == 2
    model(torch.randn(4, 8)).sum().backward()
    model.offload.close()


def test_a_buffer_is_waited_for_that_comes_back_first():
    """Not that of an update which gives way to all others, though it was taken first."""
    model, _ = wrapped()
    engine = model.offload
    blocks, buffers = engine.blocks, engine.parts.out_buffers[:3]
    taken = []

    class Stopped(Exception):
        pass

    def complete(block, cause):
        taken.append(block.index)
        raise Stopped

    gradients = Gradients(
        [], buffers, engine.parts.resources.device, engine.parts.resources.copies, None, engine.stalls, engine.spans,
        engine.parts.spare_host, "auto", False, complete,
    )  # fmt: skip
    for number, (block, buffer) in enumerate(zip(reversed(blocks), buffers, strict=False)):
        buffer.owner, buffer.taken = block, number
        block.tickets, block.gives_way = [object()], block.index >= 2
    with pytest.raises(Stopped):
        gradients._take(buffers)
    assert taken == [1]
    for block in blocks:
        block.tickets, block.gives_way = [], False
    for buffer in buffers:
        buffer.owner = None
    engine.close()


# ---- planned -------------------------------------------------------------------------------------------------

LAYERS = 16
WORK = gpt("small", LAYERS, 256, tokens=64, vocab=200)
ROOMY = Budgets(10**9, 10**9, storage_nbytes=0, staging_nbytes=100_000)


def machine(adam_params_per_s):
    """Without drives, and a bus that never limits."""
    fast = {"h2d_bytes_per_s": 1e11, "d2h_bytes_per_s": 1e11, "h2d_duplex_bytes_per_s": None, "drives": ()}
    return small_machine(1, False).model_copy(update={**fast, "adam_params_per_s": adam_params_per_s})


def planned(budgets=ROOMY, adam_params_per_s=1e8, **fixed):
    here = machine(adam_params_per_s)
    return make_plan(WORK, here, budgets, {"micro_batches": 1, **fixed}, batch_samples=16), here


def test_where_the_update_limits_a_step_is_little_longer_than_its_updates() -> None:
    """Without it, the updates of backward follow all of forward."""
    plan, here = planned()
    assert plan.held_blocks == tuple(range(LAYERS))
    step = simulate_plan(plan, WORK, here)
    in_order = simulate_plan(plan.model_copy(update={"held_blocks": ()}), WORK, here)
    numel = sum(b.stored_numel for b in WORK.blocks) + WORK.root_stored_numel
    update_s = numel / 1e8
    compute_s = step.busy_s["compute"]
    assert update_s > 0.8 * compute_s  # neither is much the longer
    assert max(update_s, compute_s) <= step.step_s < 1.25 * max(update_s, compute_s)
    assert in_order.step_s > 1.1 * step.step_s
    assert plan.predicted.step_s == pytest.approx(step.step_s, rel=0.15)


def test_an_update_that_gives_way_is_made_before_its_blocks_forward() -> None:
    plan, _ = planned()
    operations, _ = unroll(plan, WORK, shares_host=False)
    for step in (1, 2):
        for block in range(LAYERS):
            last = max(
                i
                for i, o in enumerate(operations)
                if o.kind == "update" and o.block == block and o.step == step - 1
            )
            load = next(o for o in operations if o.kind == "load" and o.block == block and o.step == step)
            made = [a for a in load.after if operations[a].block == block and operations[a].step == step - 1]
            assert any(a >= last and operations[a].kind in ("update", "state_out") for a in made)


@pytest.mark.parametrize("host_nbytes", [2 * 10**8, 4 * 10**8, 10**9])
def test_their_gradients_are_counted_within_host_memory(host_nbytes) -> None:
    budgets = Budgets(10**9, host_nbytes, storage_nbytes=0, staging_nbytes=100_000)
    plan, here = planned(budgets)
    held = held_nbytes(plan, WORK, shares_host=False, staging_nbytes=100_000)["host"]
    without = held_nbytes(
        plan.model_copy(update={"held_blocks": ()}), WORK, shares_host=False, staging_nbytes=100_000
    )["host"]
    width = 2 if plan.grads_once else 4
    assert held - without == len(plan.held_blocks) * width * WORK.blocks[0].stored_numel
    assert simulate_plan(plan, WORK, here, staging_nbytes=100_000).peak_nbytes["host"] <= host_nbytes


def test_a_frozen_block_among_the_last_has_nothing_to_give_way() -> None:
    plan, here = planned()
    frozen = [replace(b, trainable_numel=0, frozen_numel=b.trainable_numel) for b in WORK.blocks[:4]]
    step = simulate_plan(plan, replace(WORK, blocks=(*frozen, *WORK.blocks[4:])), here)
    assert step.step_s < simulate_plan(plan, WORK, here).step_s


def test_deferred_updates_hold_none() -> None:
    assert planned(update="deferred")[0].held_blocks == ()

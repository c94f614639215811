"""What `place` makes of a device budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planner.memory import Shape, device_need
from offload.planner.placement import (
    ACTIVATION_STAGING_NBYTES_MIN,
    GRAD_BUFFERS_MAX,
    BlockBytes,
    Placement,
    place,
)
from offload.planner.plan import Budgets, state_format_of
from offload.planner.search import make_plan
from offload.profiling.workload import profile_model
from offload.runtime.planning import placement_of
from tests.conftest import llama
from tests.planning import gpt, lohan_machine

PAGE = 4096


def placed(n_blocks: int, slot_pages: int, device_nbytes: int, **more: Any) -> Placement:
    """bf16 parameters of `slot_pages` pages a block, an fp32 gradient of twice that, everything on storage."""
    slot = slot_pages * PAGE
    blocks = [BlockBytes(slot, (5 * slot,), 2 * slot) for _ in range(n_blocks)]
    settings = {"host_nbytes": 1 << 20, "staging_nbytes": 0, "has_storage": True, "deferred": False}
    return place(
        blocks,
        BlockBytes(PAGE, (5 * PAGE,), 2 * PAGE),
        device_nbytes=device_nbytes,
        **{**settings, "prefetch_blocks": None, **more},
    )


@given(st.integers(2, 12), st.integers(1, 64), st.integers(0, 100))
def test_every_block_under_update_has_a_slot_beside_its_gradient_buffer_within_the_budget(
    n_blocks: int, slot_pages: int, spare_slots: int
) -> None:
    slot = slot_pages * PAGE
    budget = 3 * PAGE + 4 * slot + spare_slots * slot
    found = placed(n_blocks, slot_pages, budget)
    assert found.n_grad_buffers <= min(GRAD_BUFFERS_MAX, found.n_slots)
    assert found.n_slots <= n_blocks
    assert found.device_nbytes == 3 * PAGE + found.n_slots * slot + found.n_grad_buffers * 2 * slot <= budget


@given(
    st.integers(2, 6), st.integers(1, 4), st.integers(0, 60), st.sampled_from([(), (PAGE,), (5 * PAGE,)]), st.booleans()
)  # fmt: skip
def test_what_is_loaded_from_storage_over_a_bus_has_two_host_slots(
    n_blocks: int, slot_pages: int, spare_pages: int, states: tuple[int, ...], deferred: bool
) -> None:
    """From the smallest host memory on, for optimizers that keep nothing too."""
    slot = slot_pages * PAGE
    blocks = [BlockBytes(slot, states, 2 * slot) for _ in range(n_blocks)]
    given_more: dict[str, Any] = {
        "staging_nbytes": 0,
        "has_storage": True,
        "deferred": deferred,
        "shares_host": False,
    }
    root, device_nbytes = BlockBytes(PAGE, states, 2 * PAGE), 100 * slot
    least = 3 * PAGE + 2 * slot + 2 * slot + ACTIVATION_STAGING_NBYTES_MIN
    found = place(
        blocks, root, device_nbytes=device_nbytes, host_nbytes=least + spare_pages * PAGE, prefetch_blocks=None,
        **given_more,
    )  # fmt: skip
    assert all(found.params_in_host) or found.n_host_slots >= 2
    assert found.host_nbytes <= least + spare_pages * PAGE


def test_memory_for_two_updates_behind_backward_gives_each_a_slot_and_a_gradient_buffer_and_prefetch_one() -> (
    None
):
    slot = 16 * PAGE
    found = placed(8, 16, 3 * PAGE + 4 * slot + 2 * slot + slot + 3 * slot + slot)
    assert (found.n_slots, found.n_grad_buffers) == (4, 3)


def test_a_planned_run_without_storage_takes_the_device_memory_that_was_planned():
    work = gpt("three blocks", 3, 256, tokens=64, vocab=1000)
    fixed = {"grad_buffers": 1, "prefetch_blocks": 1, "update": "backward", "activations": "recompute"}
    plan = make_plan(
        work, lohan_machine(1), Budgets(1 << 30, 1 << 33, storage_nbytes=0), fixed, batch_samples=4
    )
    numel = work.blocks[0].trainable_numel
    blocks = [BlockBytes(2 * numel, (10 * numel,), 4 * numel)] * 3
    root = BlockBytes(2000, (10_000,), 4000)
    budgets = {"device_nbytes": 1 << 30, "host_nbytes": 1 << 33, "staging_nbytes": 1 << 20}
    placement = placement_of(plan, blocks, root, **budgets, has_storage=False, shares_host=False)
    assert (placement.n_slots, placement.n_grad_buffers) == (2, 1)
    assert placement.device_nbytes == 6000 + 2 * 2 * numel + 4 * numel


@given(st.integers(2, 12), st.integers(1, 64), st.integers(0, 100), st.booleans())
def test_half_of_a_devices_own_memory_is_left_to_compute_with_unless_more_slots_are_asked_for(
    n_blocks: int, slot_pages: int, spare_slots: int, asked: bool
) -> None:
    slot = slot_pages * PAGE
    least = 3 * PAGE + 4 * slot
    budget = least + spare_slots * slot
    own = {"host_nbytes": 1 << 30, "shares_host": False, "prefetch_blocks": n_blocks if asked else None}
    found = placed(n_blocks, slot_pages, budget, **own)
    assert found.device_nbytes <= (budget if asked else max(least, budget // 2))
    if asked and spare_slots >= 2 * n_blocks:
        assert found.n_slots == n_blocks


def test_a_refusal_counts_what_the_libraries_of_the_device_take() -> None:
    slot, own = 16 * PAGE, 1000 * PAGE
    least = 3 * PAGE + 4 * slot
    told = []
    for device_nbytes in (least - 1, least):
        try:
            placed(4, 16, device_nbytes, host_nbytes=1 << 30, shares_host=False, device_own_nbytes=own)
        except BudgetError as refused:
            told.append(str(refused))
    assert len(told) == 1
    assert f"device_memory='{least + own}'" in told[0]
    assert "for the libraries of the device" in told[0]


def test_a_plan_for_a_device_of_its_own_has_room_for_what_the_root_computes_with() -> None:
    with torch.device("meta"):
        model = llama(layers=2, vocab=50_000).to(torch.bfloat16)
    in_chunks = profile_model(model, 64)
    whole = dataclasses.replace(in_chunks, whole_logits=True)
    shape = Shape(micro_batches=4, n_slots=2, n_grad_buffers=1, boundary_on_device=True)

    def of_root(work, samples):
        need = device_need(work, state_format_of(work), samples, shape)
        return need.working + need.boundary + need.logits

    for samples in (16, 64):
        assert of_root(whole, samples) >= samples * 64 * 50_000 * (
            2 + 4
        )  # bf16 of the head, fp32 of the loss
        assert (
            of_root(in_chunks, samples) >= 64 * 50_000 * (4 + 2) + 64 * 2**20
        )  # the head's gradient, and logits
    assert of_root(in_chunks, 64) < of_root(whole, 64) / 3


def test_libraries_of_the_device_take_from_what_is_planned() -> None:
    work, machine = gpt("m", 4, 256, tokens=64, vocab=1000), lohan_machine(1)
    fixed = {"activations": "recompute"}
    without = make_plan(work, machine, Budgets(50_000_000, 1 << 33), fixed, batch_samples=4)
    beside = make_plan(
        work, machine, Budgets(60_000_000, 1 << 33, device_own_nbytes=10_000_000), fixed, batch_samples=4
    )
    assert beside == without

"""What `place` makes of a device budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.planner.placement import GRAD_BUFFERS_MAX, BlockBytes, Placement, place
from offload.planner.plan import Budgets
from offload.planner.search import make_plan
from offload.runtime.planning import placement_of
from tests.planning import gpt, lohan_machine

PAGE = 4096


def placed(n_blocks: int, slot_pages: int, device_nbytes: int) -> Placement:
    """bf16 parameters of `slot_pages` pages a block, an fp32 gradient of twice that, everything on storage."""
    slot = slot_pages * PAGE
    blocks = [BlockBytes(slot, (5 * slot,), 2 * slot) for _ in range(n_blocks)]
    return place(
        blocks,
        BlockBytes(PAGE, (5 * PAGE,), 2 * PAGE),
        device_nbytes=device_nbytes,
        host_nbytes=1 << 20,
        staging_nbytes=0,
        has_storage=True,
        deferred=False,
        prefetch_blocks=None,
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

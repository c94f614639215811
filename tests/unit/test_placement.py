"""What `place` makes of a device budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.planner.placement import GRAD_BUFFERS_MAX, BlockBytes, Placement, place

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

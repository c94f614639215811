"""Which optimizer state host memory holds when it cannot hold all, and how an update goes through both kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload import _C
from offload.planner.placement import BlockBytes, place
from offload.planner.plan import Budgets
from offload.planner.search import make_plan
from offload.schedule.run import simulate_plan
from tests.planning import gpt, lohan_machine
from tests.unit.test_update_pipeline import STATE_OFFSET, Harness

PAGE = 4096


def placed_chunks(n_chunks: list[int], n_root_chunks: int, host_chunks: int) -> list[int]:
    """Chunks in host memory with room for `host_chunks` of a page each; a slot for every block is on the device."""
    blocks = [BlockBytes(PAGE, (PAGE,) * n, PAGE) for n in n_chunks]
    found = place(
        blocks,
        BlockBytes(PAGE, (PAGE,) * n_root_chunks, PAGE),
        device_nbytes=(len(blocks) + 8) * PAGE,
        host_nbytes=host_chunks * PAGE + (128 << 10),
        staging_nbytes=0,
        has_storage=True,
        deferred=False,
        prefetch_blocks=None,
    )
    assert found.params_on_device
    return found.host_chunks


@given(st.lists(st.integers(1, 40), min_size=2, max_size=8), st.integers(0, 20), st.integers(0, 200))
def test_host_memory_takes_the_roots_state_then_the_first_blocks_then_one_share_of_every_other(
    n_chunks: list[int], n_root: int, room: int
) -> None:
    room = min(room, 24)  # beyond that a part of the room is for activations on their way to storage
    *held, root = placed_chunks(n_chunks, n_root, room)
    assert root == min(room, n_root)
    assert held[0] == min(room - root, n_chunks[0])
    left = room - root - held[0]
    assert sum(held[1:]) == min(left, sum(n_chunks[1:]))
    shares = [(n / whole, 1 / whole) for n, whole in zip(held[1:], n_chunks[1:], strict=True)]
    assert all(a - b <= chunk + 1e-12 for a, _ in shares for b, chunk in shares)


def test_the_same_share_of_every_blocks_state_keeps_storage_busy_where_whole_blocks_let_backward_wait_for_it() -> (
    None
):
    """Simulated; bytes on storage, in host memory and on the bus are the same."""
    work, machine = gpt("13B", 40, 5120), lohan_machine(4, 120, adam_params_per_s=1e10)
    plan = make_plan(work, machine, Budgets(22 * 10**9, 108 * 10**9), batch_samples=32)
    state = plan.state_format.state_of(work.blocks[0].stored_numel)
    left = sum(plan.states_in_host[:-1]) * state
    whole_blocks = []
    for _ in work.blocks:
        whole_blocks.append(min(left, state) / state)
        left -= min(left, state)
    assert sum(whole_blocks) == pytest.approx(sum(plan.states_in_host[:-1]))
    unlike = plan.model_copy(update={"states_in_host": (*whole_blocks, plan.states_in_host[-1])})
    spread_s, unlike_s = (simulate_plan(each, work, machine).step_s for each in (plan, unlike))
    assert spread_s < 0.95 * unlike_s


@pytest.mark.parametrize(("n_chunks", "n_host"), [(8, 4), (9, 3), (6, 0), (6, 6), (7, 6), (7, 1)])
def test_chunks_on_storage_are_updated_evenly_among_those_in_host_memory(tmp_path, n_chunks, n_host):
    """So that the drive works while those in host memory are computed: one thread, and the order it goes in."""
    harness, n = Harness(tmp_path, 2048, 1, n_threads=1), n_chunks * 2048
    param, grad, state = torch.zeros(n), torch.ones(n), torch.zeros(n * 2)
    if n_host < n_chunks:
        harness.store(torch.zeros((n_chunks - n_host) * 2048 * 2), STATE_OFFSET)
    updated: list[int] = []
    job = _C.UpdateJob(
        rule="callback", callback=lambda segment, element, *rest: updated.append(element // 2048),
        param_codec="fp32", n_elements=n, param_address=param.data_ptr(), state_host_address=state.data_ptr(),
        host_chunks=n_host, state_offset=STATE_OFFSET, grad_address=grad.data_ptr(),
        segments=[(0, n, _C.Hyper(1e-2, 0.9, 0.99, 1e-8, 0.0, 1))],
    )  # fmt: skip
    harness.pipeline.submit(job).wait(timeout_s=30)
    harness.close()
    assert sorted(updated) == list(range(n_chunks))
    in_host = [index for index in updated if index < n_host]
    assert in_host == sorted(in_host)
    for end in range(n_chunks + 1):  # of any first part the same share as of the whole, to one chunk
        n_stored = sum(index >= n_host for index in updated[:end])
        assert abs(n_stored - end * (n_chunks - n_host) / n_chunks) <= 1

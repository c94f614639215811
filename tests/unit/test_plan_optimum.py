"""A plan is as fast as the fastest of all that could be made, by trying them all with the documented formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from offload.planner.activations import candidates, spread
from offload.planner.memory import Shape, device_need, host_need
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN
from offload.planner.plan import SPLIT_MASTER, Budgets
from offload.planner.space import OFF_DEVICE_MICRO_BATCHES_MIN
from offload.planner.tables import STATE_CHUNKS_PER_BLOCK
from offload.planner.workload import BlockWork, SavedTensor, Workload
from tests.planning import MB, STAGING, small_machine, step_s


def even_workload(n_blocks: int, flops: tuple[float, ...]) -> Workload:
    """All tensors of equal size, so that only how many are saved where matters, and which by their FLOPs."""
    one, numel = 400_000, 500_000
    saved = tuple(SavedTensor(f"t{i}", "linear", one, f) for i, f in enumerate(flops))
    blocks = tuple(
        BlockWork(f"b{i}", numel, 0, {"linear": sum(flops) + 1e9}, one, saved) for i in range(n_blocks)
    )
    return Workload("even", 64, 2, blocks, 100_000, 0, 1e8, 50_000)


def phase_s(machine, flops, h2d, d2h, read, written, updated, exposed) -> float:
    """docs/planner.md, `Seconds of a phase`, written again."""
    bus_both = min(h2d / machine.h2d_duplex_bytes_per_s, d2h / machine.d2h_bytes_per_s)
    bus = (
        bus_both
        + max(0.0, h2d - bus_both * machine.h2d_duplex_bytes_per_s) / machine.h2d_bytes_per_s
        + max(0.0, d2h - bus_both * machine.d2h_bytes_per_s) / machine.d2h_bytes_per_s
    )
    n = len(machine.drives)
    storage = read / (n * 6.5e8) + written / (n * 3.4e8)
    dram = (h2d + d2h + read + written + 28 * updated) / machine.dram_bytes_per_s
    busy = (flops / 1e12 + exposed, bus, storage, dram, updated / machine.adam_params_per_s)
    return sum(seconds**8 for seconds in busy) ** (1 / 8)


def oracle_step_s(
    work,
    machine,
    batch,
    shape,
    deferred,
    n_params,
    n_chunks,
    n_root_chunks,
    n_kept,
    n_host,
    n_swapped,
    recompute,
    grads_host,
):
    """One assignment, by totals. Quantities of units are numbers of equal tensors."""
    n = len(work.blocks)
    numel = work.blocks[0].trainable_numel
    unit = batch * work.blocks[0].input_nbytes_per_sample
    p = n * numel
    chunk = -(-10 * numel // STATE_CHUNKS_PER_BLOCK)
    states_host = min(n_chunks * chunk, 10 * p)
    root_chunk = -(-10 * work.root_trainable_numel // STATE_CHUNKS_PER_BLOCK)
    root_states = 10 * work.root_trainable_numel - n_root_chunks * root_chunk
    stored = 1 - n_params / n
    states = 10 * p - states_host
    boundary = 0 if shape.boundary_on_device else n * unit
    turn = 1 - min(1.0, shape.n_slots / n)
    # Three blocks' parameters are in host memory at both turns; with a slot for each block the device gets them back
    # from their updates, and it is these that read them.
    read = 1 - min(1.0, 3 / (n * stored)) if stored else 0.0
    early_reads = (0.0, 1.0) if shape.n_slots >= n else (read, read)
    spilled = 4 * numel * (n - grads_host) if deferred else 0
    forward_flops = batch * (n * work.blocks[0].flops_per_sample + work.root_flops_per_sample)
    launches = n * shape.micro_batches * machine.launch_overhead_s
    # Gradients that come once stay bf16: two blocks' in a buffer, and half of the bytes over the bus.
    once = shape.micro_batches == 1 and not deferred
    width = 2 if once else 4
    one_update = width * numel / machine.d2h_bytes_per_s + max(
        max(0, 10 * numel - states_host) / (len(machine.drives) * 6.5e8), numel / machine.adam_params_per_s
    )
    late = 1 if deferred else 0
    swapped = (n_host + n_swapped) * unit
    exposed = launches + (1 - late) * one_update
    if shape.n_grad_buffers < 2 and not once:
        # Three quarters of a block's last micro-batch and of the next one's first hide the copy, and recomputation.
        backward_flops = 2 * batch * n * work.blocks[0].flops_per_sample
        hidden_s = (1.5 * backward_flops + recompute) / shape.micro_batches / 1e12
        exposed += max(0.0, 4 * p / machine.d2h_bytes_per_s - hidden_s) * (1 - 1 / n)
    forward = phase_s(
        machine,
        forward_flops,
        2 * p + boundary,
        swapped,
        (1 - late) * 2 * p * stored * early_reads[0] + late * (2 * p * stored * read + states) + spilled,
        n_swapped * unit + late * (2 * p * stored + states),
        late * p,
        launches + late * one_update,
    )
    backward = phase_s(
        machine,
        2 * forward_flops + recompute,
        2 * p * turn + boundary + swapped,
        width * p + boundary,
        2 * p * stored * early_reads[1] + n_swapped * unit + (1 - late) * states,
        (1 - late) * (2 * p * stored + states) + spilled,
        (1 - late) * p,
        exposed,
    )
    root = work.root_trainable_numel
    drives = len(machine.drives)
    stages = (
        4 * root / machine.d2h_bytes_per_s,
        max(
            root_states / (drives * 6.5e8) + root_states / (drives * 3.4e8), root / machine.adam_params_per_s
        ),
        2 * root / machine.h2d_bytes_per_s,
    )
    tail = max(stages) + (sum(stages) - max(stages)) / 16
    return forward + backward + tail


def exhaustive_step_s(work, machine, budgets, batch) -> float:
    """Every shape, update mode, set of saved tensors, split of them over the tiers, and placement of state."""
    n = len(work.blocks)
    numel = work.blocks[0].trainable_numel
    unit = batch * work.blocks[0].input_nbytes_per_sample
    chunk = -(-10 * numel // STATE_CHUNKS_PER_BLOCK)
    root_chunk = -(-10 * work.root_trainable_numel // STATE_CHUNKS_PER_BLOCK)
    flops = [t.recompute_flops_per_sample for b in work.blocks for t in b.saved]
    best = float("inf")
    for m, g, boundary in itertools.product(
        [m for m in range(1, batch + 1) if batch % m == 0], (1, 2), (True, False)
    ):
        shape = Shape(m, 2, g, boundary)
        spare = budgets.device_memory_nbytes - device_need(work, SPLIT_MASTER, batch, shape).total
        if spare < 0:
            continue
        if not boundary and m < OFF_DEVICE_MICRO_BATCHES_MIN:
            continue
        free_with_staging, free_without = (
            budgets.host_memory_nbytes
            - host_need(
                work,
                SPLIT_MASTER,
                batch,
                shape,
                staging_nbytes=STAGING,
                shares_host=False,
                has_storage=True,
                activation_staging=staging,
            )
            for staging in (None, ACTIVATION_STAGING_NBYTES_MIN)
        )
        for deferred, n_saved in itertools.product((False, True), range(len(flops) + 1)):
            recompute = batch * (sum(flops) - sum(sorted(flops, reverse=True)[:n_saved]))
            units = n_saved + n
            keepable = units if boundary else n_saved
            for n_kept in range(min(keepable, spare // unit) + 1):
                for n_host in range(units - n_kept + 1):
                    free = free_without if n_host == units - n_kept else free_with_staging
                    for grads in range(n + 1) if deferred else (0,):
                        rest = free - n_host * unit - grads * 4 * numel
                        if rest < 0:
                            continue
                        for n_params in range(min(n, rest // (2 * numel)) + 1):
                            left = rest - n_params * 2 * numel
                            for n_chunks, n_root in state_chunks_in_host(left, n, chunk, root_chunk):
                                found = oracle_step_s(
                                    work, machine, batch, shape, deferred, n_params, n_chunks, n_root,
                                    n_kept, n_host, units - n_kept - n_host, recompute, grads,
                                )  # fmt: skip
                                best = min(best, found)
    return best


def state_chunks_in_host(left, n, chunk, root_chunk):
    """(of the blocks, of the root): the blocks' first, or the root's."""
    n_chunks = min(left // chunk, n * STATE_CHUNKS_PER_BLOCK)
    n_root = 0
    if n_chunks == n * STATE_CHUNKS_PER_BLOCK:
        n_root = min((left - n_chunks * chunk) // root_chunk, STATE_CHUNKS_PER_BLOCK)
    yield n_chunks, n_root
    n_root, n_chunks = min(left // root_chunk, STATE_CHUNKS_PER_BLOCK), 0
    if n_root == STATE_CHUNKS_PER_BLOCK:
        n_chunks = min((left - n_root * root_chunk) // chunk, n * STATE_CHUNKS_PER_BLOCK)
    yield n_chunks, n_root


@pytest.mark.parametrize(
    ("device_mb", "host_mb", "n_drives", "dram_gb_s", "flops"),
    [
        (14, 12, 1, 50.0, (4e9, 1e9)),
        (14, 30, 2, 50.0, (4e10, 2e10)),
        (18, 14, 1, 0.6, (3e10, 3e9)),
        (14, 18, 2, 50.0, (5e9, 4e9)),
    ],
)
def test_the_plan_is_as_fast_as_the_best_of_all(device_mb, host_mb, n_drives, dram_gb_s, flops) -> None:
    work = even_workload(2, flops)
    machine = small_machine(n_drives, False, dram_gb_s)
    budgets = Budgets(device_mb * MB, host_mb * MB, staging_nbytes=STAGING)
    ours = step_s(work, machine, budgets, 4, {"prefetch_blocks": 1})
    assert ours == pytest.approx(exhaustive_step_s(work, machine, budgets, 4), rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_every_saved_set_is_the_best_for_its_bytes(seed) -> None:
    """Against all subsets of units of random sizes and benefits."""
    draw = np.random.default_rng(seed)
    tensors = tuple(
        SavedTensor(f"t{i}", "linear", int(draw.integers(1, 6)), float(draw.integers(1, 9))) for i in range(4)
    )
    blocks = tuple(BlockWork(f"b{i}", 10, 0, {"linear": 50.0}, 1, tensors) for i in range(2))
    found = candidates(Workload("random", 4, 2, blocks, 0, 0, 0.0, 1))
    units = [t for _ in blocks for t in tensors]
    best: dict[int, float] = {}
    for chosen in itertools.product((0, 1), repeat=len(units)):
        nbytes = sum(t.nbytes_per_sample for t, c in zip(units, chosen, strict=True) if c)
        again = sum(t.recompute_flops_per_sample for t, c in zip(units, chosen, strict=True) if not c)
        best[nbytes] = min(best.get(nbytes, np.inf), again)
    least, frontier = np.inf, []
    for nbytes in sorted(best):
        if best[nbytes] < least:
            least = best[nbytes]
            frontier.append((nbytes, least))
    assert list(zip(found.saved_nbytes, found.recompute_flops, strict=True)) == frontier


def test_spread_takes_what_it_is_asked_for_evenly() -> None:
    assert spread(10, 0) == []
    assert spread(10, 10) == list(range(10))
    for count in range(1, 11):
        chosen = spread(10, count)
        gaps = np.diff([-1, *chosen])
        assert len(chosen) == count
        assert gaps.max() - gaps.min() <= 1

"""What the planner promises: never above a budget, more never slower, refused only below the bound, as good as trying
everything, the same answer every time, and quickly."""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError, ConfigError
from offload.planner.activations import candidates, spread
from offload.planner.explain import explain, lower_bounds
from offload.planner.hardware import Hardware
from offload.planner.memory import Shape, device_need, host_need
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN
from offload.planner.plan import INPUT, SPLIT_MASTER, Budgets, Plan
from offload.planner.points import Search
from offload.planner.report import plan_lines
from offload.planner.search import make_plan
from offload.planner.space import OFF_DEVICE_MICRO_BATCHES_MIN
from offload.planner.tables import STATE_CHUNKS_PER_BLOCK
from offload.planner.workload import BlockWork, SavedTensor, Workload
from offload.schedule.run import simulate_plan
from tests.planning import gpt, lohan_machine

MB = 10**6
STAGING = 100_000
BUDGETS = ("device_memory_nbytes", "host_memory_nbytes", "storage_nbytes", "written_nbytes_per_step")


def small_machine(n_drives: int, shares_host: bool, dram_gb_s: float = 50.0) -> Hardware:
    """Slow enough that small models keep it busy."""
    machine = lohan_machine(n_drives)
    drives = tuple(
        d.model_copy(
            update={"read_bytes_per_s": 6.5e8, "write_bytes_per_s": 3.4e8, "capacity_nbytes": 10**12}
        )
        for d in machine.drives
    )
    return machine.model_copy(
        update={
            "name": "small",
            "drives": drives,
            "shares_host": shares_host,
            "matmul_flops_per_s": {"bfloat16": 1e12},
            "h2d_bytes_per_s": 2e9,
            "d2h_bytes_per_s": 1.5e9,
            "h2d_duplex_bytes_per_s": 1e9,
            "dram_bytes_per_s": dram_gb_s * 1e9,
            "adam_params_per_s": 2e8,
            "step_overhead_s": 0.0,
        }
    )


@st.composite
def cases(draw):
    """A small model, a machine, a batch and budgets from far too little to plenty."""
    work = gpt(
        "small",
        draw(st.integers(1, 5)),
        draw(st.sampled_from([64, 128])),
        tokens=draw(st.sampled_from([16, 64])),
        vocab=200,
    )
    machine = small_machine(draw(st.integers(0, 2)), draw(st.booleans()), draw(st.sampled_from([0.5, 50.0])))
    scale = 4 * 16 * work.numel
    budgets = Budgets(
        device_memory_nbytes=int(scale * draw(st.floats(0.02, 1.0))),
        host_memory_nbytes=int(scale * draw(st.floats(0.0, 1.0))),
        storage_nbytes=draw(st.none() | st.integers(scale // 20, scale)),
        written_nbytes_per_step=draw(st.none() | st.integers(scale // 50, scale)),
        staging_nbytes=STAGING,
        clips_gradients=draw(st.booleans()),
    )
    return work, machine, budgets, draw(st.integers(1, 6))


def quick(test):
    return settings(
        max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )(test)


def step_s(work, machine, budgets, batch, fixed=None) -> float:
    plan = make_plan(work, machine, budgets, fixed, batch_samples=batch)
    assert plan.predicted is not None
    return plan.predicted.step_s


@quick
@given(cases())
def test_no_tier_is_ever_above_its_budget_in_the_plan_or_in_the_simulation(case) -> None:
    work, machine, budgets, batch = case
    try:
        plan = make_plan(work, machine, budgets, batch_samples=batch)
    except BudgetError:
        assume(False)
    simulated = simulate_plan(plan, work, machine, staging_nbytes=STAGING)
    limits = {
        "device": budgets.device_memory_nbytes,
        "host": budgets.host_memory_nbytes,
        "storage": budgets.storage_nbytes,
    }
    for tier, limit in limits.items():
        if limit is not None:
            assert plan.predicted.peak_nbytes[tier] <= limit
            assert simulated.peak_nbytes[tier] <= limit + 64  # fractions of bytes, rounded
    if budgets.written_nbytes_per_step is not None:
        assert simulated.written_nbytes <= budgets.written_nbytes_per_step * (1 + 1e-9) + 64


@quick
@given(cases())
def test_the_simulated_step_moves_the_bytes_that_were_predicted(case) -> None:
    work, machine, budgets, batch = case
    try:
        plan = make_plan(work, machine, budgets, batch_samples=batch)
    except BudgetError:
        assume(False)
    simulated = simulate_plan(plan, work, machine, staging_nbytes=STAGING)
    for name, nbytes in (
        ("read", simulated.read_nbytes),
        ("written", simulated.written_nbytes),
        ("h2d", simulated.h2d_nbytes),
        ("d2h", simulated.d2h_nbytes),
    ):
        # a block that stays in its slot at a turn may be one with parameters in host memory: counted as the average
        slack = 4 * plan.n_slots * 2 * max(b.trainable_numel for b in work.blocks) if name == "read" else 1e3
        assert nbytes == pytest.approx(plan.predicted.bytes[name], rel=1e-6, abs=slack)
    assert simulated.step_s >= 0.999 * plan.predicted.lower_bound_s - 1e-9


@quick
@given(cases(), st.sampled_from(BUDGETS), st.floats(1.0, 4.0))
def test_more_of_any_budget_is_never_slower(case, name, factor) -> None:
    work, machine, budgets, batch = case
    assume(getattr(budgets, name) is not None)
    more = replace(budgets, **{name: int(getattr(budgets, name) * factor) + 1})
    try:
        before = step_s(work, machine, budgets, batch)
    except BudgetError:
        assume(False)
    assert step_s(work, machine, more, batch) <= before * (1 + 1e-6)


@quick
@given(cases())
def test_a_further_drive_is_never_slower(case) -> None:
    work, machine, budgets, batch = case
    assume(machine.drives)
    try:
        before = step_s(work, machine, budgets, batch)
    except BudgetError:
        assume(False)
    wider = machine.model_copy(update={"drives": (*machine.drives, machine.drives[0])})
    assert step_s(work, wider, budgets, batch) <= before * (1 + 1e-6)


@quick
@given(cases())
def test_refused_only_where_the_stated_bound_says_so(case) -> None:
    """With storage and without limits on it, the two memories decide alone, and each has its own bound."""
    work, machine, budgets, batch = case
    assume(machine.drives)
    budgets = replace(budgets, storage_nbytes=None, written_nbytes_per_step=None)
    search = Search(work, machine, budgets, {}, batch)
    bounds = lower_bounds(search)
    try:
        make_plan(work, machine, budgets, batch_samples=batch)
    except BudgetError as error:
        if (
            budgets.device_memory_nbytes >= bounds.device_memory_nbytes
            and budgets.host_memory_nbytes >= bounds.host_memory_nbytes
        ):
            # Each alone would do, but the boundary is either on the device or in host memory.
            assert all(
                not fits_by_hand(work, machine, budgets, batch, shape)
                for shape in every_shape(work, batch, machine)
            )
        assert f"{bounds.device_memory_nbytes / 1e6:.2f} MB of device memory" in str(error)
    else:
        assert budgets.device_memory_nbytes >= bounds.device_memory_nbytes
        assert budgets.host_memory_nbytes >= bounds.host_memory_nbytes


def every_shape(work, batch, machine):
    boundaries = (True,) if machine.shares_host else (True, False)
    return [
        Shape(m, s, g, b)
        for m in range(1, batch + 1)
        for s in {min(2, len(work.blocks))}
        for g in (1,)
        for b in boundaries
        if b or m >= OFF_DEVICE_MICRO_BATCHES_MIN
    ]


def fits_by_hand(work, machine, budgets, batch, shape) -> bool:
    """Nothing placed by choice, every activation on storage."""
    device = device_need(work, SPLIT_MASTER, batch, shape).total
    host = host_need(
        work,
        SPLIT_MASTER,
        batch,
        shape,
        staging_nbytes=budgets.staging_nbytes,
        shares_host=machine.shares_host,
        has_storage=True,
    )
    return device <= budgets.device_memory_nbytes and host <= budgets.host_memory_nbytes


# ---- as good as trying everything ------------------------------------------------------------------------------


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
    spilled = 4 * numel * (n - grads_host) if deferred else 0
    forward_flops = batch * (n * work.blocks[0].flops_per_sample + work.root_flops_per_sample)
    launches = n * shape.micro_batches * machine.launch_overhead_s
    once = shape.micro_batches == 1 and not deferred
    """Gradients that come once stay bf16: two blocks' in a buffer, and half of the bytes over the bus."""
    width = 2 if once else 4
    one_update = width * numel / machine.d2h_bytes_per_s + max(
        states / n / (len(machine.drives) * 6.5e8), numel / machine.adam_params_per_s
    )
    late = 1 if deferred else 0
    swapped = (n_host + n_swapped) * unit
    exposed = launches + (1 - late) * one_update
    if shape.n_grad_buffers < 2 and not once:
        exposed += 4 * p / machine.d2h_bytes_per_s * (1 - 1 / n)
    forward = phase_s(
        machine,
        forward_flops,
        2 * p + boundary,
        swapped,
        (1 - late) * 2 * p * stored + late * (2 * p * stored + states) + spilled,
        n_swapped * unit + late * (2 * p * stored + states),
        late * p,
        launches + late * one_update,
    )
    backward = phase_s(
        machine,
        2 * forward_flops + recompute,
        2 * p * turn + boundary + swapped,
        width * p + boundary,
        2 * p * stored * turn + n_swapped * unit + (1 - late) * states,
        (1 - late) * (2 * p * stored + states) + spilled,
        (1 - late) * p,
        exposed,
    )
    root = work.root_trainable_numel
    drives = len(machine.drives)
    tail = (
        4 * root / machine.d2h_bytes_per_s
        + max(
            root_states / (drives * 6.5e8) + root_states / (drives * 3.4e8), root / machine.adam_params_per_s
        )
        + 2 * root / machine.h2d_bytes_per_s
    )
    return forward + backward + tail


def exhaustive_step_s(work, machine, budgets, batch) -> float:
    """Every shape, update mode, set of saved tensors, split of them over the tiers, and placement of state."""
    n = len(work.blocks)
    numel = work.blocks[0].trainable_numel
    unit = batch * work.blocks[0].input_nbytes_per_sample
    chunk = -(-10 * numel // STATE_CHUNKS_PER_BLOCK)
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
                            n_chunks = min(left // chunk, n * STATE_CHUNKS_PER_BLOCK)
                            n_root = 0
                            if n_chunks == n * STATE_CHUNKS_PER_BLOCK:
                                root_chunk = -(-10 * work.root_trainable_numel // STATE_CHUNKS_PER_BLOCK)
                                n_root = min((left - n_chunks * chunk) // root_chunk, STATE_CHUNKS_PER_BLOCK)
                            found = oracle_step_s(
                                work, machine, batch, shape, deferred, n_params, n_chunks, n_root,
                                n_kept, n_host, units - n_kept - n_host, recompute, grads,
                            )  # fmt: skip
                            best = min(best, found)
    return best


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


# ---- choices, refusals, words ----------------------------------------------------------------------------------


def test_175_billion_parameters_are_planned_in_under_two_seconds_and_alike() -> None:
    work, machine = gpt("175b", 96, 12288), lohan_machine()
    budgets = Budgets(24 * 10**9, 256 * 10**9)
    start = time.process_time()
    first = make_plan(work, machine, budgets, batch_samples=16)
    assert time.process_time() - start < 2.0
    assert make_plan(work, machine, budgets, batch_samples=16) == first
    assert Plan.from_json(first.to_json()) == first


FIXED = [
    ({"micro_batches": 3}, lambda p: p.micro_batches == 3),
    ({"update": "deferred"}, lambda p: p.update == "deferred"),
    ({"update": "backward"}, lambda p: p.update == "backward"),
    ({"deferred_fraction": 0.5}, lambda p: p.update == "mixed" and len(p.deferred_blocks) == 2),
    ({"prefetch_blocks": 2}, lambda p: p.prefetch_blocks == 2),
    ({"grad_buffers": 1}, lambda p: p.n_grad_buffers == 1),
    ({"boundary_on_device": False}, lambda p: not p.boundary_on_device),
    ({"activations": "recompute"}, lambda p: all(set(b.values()) == {b[INPUT], "recompute"} for b in p.activations)),
    ({"activations": "save"}, lambda p: all(b["fc1"] != "recompute" for b in p.activations)),
    ({"activations": "keep"}, lambda p: {o for b in p.activations for o in b.values()} == {"device"}),
    ({"inputs": "device"}, lambda p: {b[INPUT] for b in p.activations} == {"device"}),
    ({"inputs": "host"}, lambda p: {b[INPUT] for b in p.activations} == {"host"}),
    ({"inputs": "storage"}, lambda p: {b[INPUT] for b in p.activations} == {"storage"}),
    ({"activations_on_device": False}, lambda p: all(o != "device" for b in p.activations for o in b.values())),
    ({"activations_host_fraction": 0.0}, lambda p: all(o != "host" for b in p.activations for o in b.values())),
    ({"params_host_fraction": 0.5}, lambda p: sum(p.params_in_host) == 2),
    ({"states_host_fraction": 0.0}, lambda p: not any(p.states_in_host)),
    ({"update": "deferred", "grads_host_fraction": 0.5}, lambda p: sum(p.grads_in_host) == 2),
]  # fmt: skip


@pytest.mark.parametrize(("fixed", "holds"), FIXED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_every_choice_can_be_fixed(fixed, holds) -> None:
    work = gpt("small", 4, 128, tokens=64, vocab=200)
    machine = small_machine(1, False)
    plan = make_plan(work, machine, Budgets(80 * MB, 60 * MB, staging_nbytes=STAGING), fixed, batch_samples=6)
    assert holds(plan)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"prefetch": 1}, "unknown choice 'prefetch'.*prefetch_blocks"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"micro_batches": 9}, "the batch has 6 samples"),
        ({"update": "later"}, "update='later'"),
        ({"params_host_fraction": 2}, "params_host_fraction=2"),
        ({"activations": "drop"}, "activations='drop'"),
        ({"inputs": "drawer"}, "inputs='drawer'"),
        ({"inputs": "device", "boundary_on_device": False}, "contradict"),
    ],
)
def test_a_fixed_choice_that_makes_no_sense_is_refused(fixed, message) -> None:
    work = gpt("small", 4, 128, tokens=64, vocab=200)
    with pytest.raises(ConfigError, match=message):
        make_plan(work, small_machine(1, False), Budgets(80 * MB, 60 * MB), fixed, batch_samples=6)


def test_clipping_defers_every_update_and_contradicts_backward() -> None:
    work, machine = gpt("small", 4, 128, tokens=64, vocab=200), small_machine(1, False)
    budgets = Budgets(80 * MB, 60 * MB, clips_gradients=True)
    assert make_plan(work, machine, budgets, batch_samples=2).update == "deferred"
    with pytest.raises(ConfigError, match="global gradient norm"):
        make_plan(work, machine, budgets, {"update": "backward"}, batch_samples=2)


def test_a_refusal_names_changes_that_do_help() -> None:
    work, machine = gpt("small", 4, 128, tokens=64, vocab=200), small_machine(1, False)
    plenty = Budgets(80 * MB, 60 * MB, staging_nbytes=STAGING)
    least = lower_bounds(Search(work, machine, plenty, {}, 8))
    for short, name in (
        (replace(plenty, device_memory_nbytes=int(least.device_memory_nbytes * 0.6)), "device_memory"),
        (replace(plenty, host_memory_nbytes=STAGING), "host_memory"),
    ):
        with pytest.raises(BudgetError) as refused:
            make_plan(work, machine, short, batch_samples=8)
        named = re.search(rf"{name}='([\d.]+)MB'", str(refused.value))
        assert named is not None
        enough = replace(short, **{f"{name}_nbytes": int(float(named.group(1)) * MB)})
        make_plan(work, machine, enough, batch_samples=8)
    no_drives = machine.model_copy(update={"drives": ()})
    with pytest.raises(BudgetError, match=r"storage=\[directory on an SSD\]"):
        make_plan(work, no_drives, replace(plenty, host_memory_nbytes=9 * MB), batch_samples=8)


def test_a_limit_on_writes_is_kept_with_host_memory() -> None:
    """Without it nothing binds the writes; with it more state has to stay in host memory, or it is refused."""
    work, machine = gpt("small", 4, 128, tokens=64, vocab=200), small_machine(1, False)
    budgets = Budgets(80 * MB, 60 * MB, written_nbytes_per_step=MB, staging_nbytes=STAGING)
    plan = make_plan(work, machine, budgets, batch_samples=2)
    assert plan.predicted.bytes["written"] <= MB
    with pytest.raises(BudgetError, match="written a step"):
        make_plan(work, machine, replace(budgets, host_memory_nbytes=5 * MB), batch_samples=2)


def test_what_one_more_brings_is_what_planning_again_gives() -> None:
    work, machine = gpt("13b", 40, 5120), lohan_machine(1)
    budgets = Budgets(24 * 10**9, 64 * 10**9)
    plan = make_plan(work, machine, budgets, batch_samples=8)
    why = explain(plan, work, machine, budgets)
    assert plan.predicted.binding == why.binding == "storage"
    more = step_s(work, machine, replace(budgets, host_memory_nbytes=65 * 10**9), 8)
    assert why.one_more_gb_host_s == pytest.approx(plan.predicted.step_s - more)
    assert why.one_more_drive_s == pytest.approx(
        plan.predicted.step_s - step_s(work, lohan_machine(2), budgets, 8)
    )
    assert why.one_more_drive_s > 10.0
    assert any("bound by the drives" in line for line in why.lines(plan))
    assert any(line.startswith("activations") for line in plan_lines(plan))


def test_gradients_that_wait_for_their_only_buffer_are_named() -> None:
    """175B on 24 GB: a second buffer of 7.25 GB does not fit, and the first is emptied over the bus 95 times."""
    work, machine = gpt("175b", 96, 12288), lohan_machine()
    budgets = Budgets(24 * 10**9, 256 * 10**9)
    plan = make_plan(work, machine, budgets, batch_samples=16)
    assert plan.n_grad_buffers == 1
    grads = 4 * work.blocks[0].trainable_numel
    assert plan.predicted.exposed_seconds["gradient"] == pytest.approx(95 * grads / 24.8e9)
    why = explain(plan, work, machine, budgets)
    assert any("a second one takes 7.25GB of device memory" in line for line in why.lines(plan))


def test_spread_takes_what_it_is_asked_for_evenly() -> None:
    assert spread(10, 0) == []
    assert spread(10, 10) == list(range(10))
    for count in range(1, 11):
        chosen = spread(10, count)
        gaps = np.diff([-1, *chosen])
        assert len(chosen) == count
        assert gaps.max() - gaps.min() <= 1

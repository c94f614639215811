"""What a user can fix in a plan and what is refused, the words for both, and that planning is quick and repeatable."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from offload.errors import BudgetError, ConfigError
from offload.planner.explain import explain, lower_bounds
from offload.planner.plan import INPUT, Budgets, Plan
from offload.planner.points import Search
from offload.planner.report import plan_lines
from offload.planner.search import make_plan
from offload.schedule.fastest import make_simulated_plan
from offload.schedule.run import simulate_plan
from tests.planning import MB, STAGING, gpt, lohan_machine, small_machine, step_s


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


@pytest.mark.slow
def test_some_updates_wait_where_the_cpu_limits_and_no_memory_is_left_for_gradients() -> None:
    """175 B parameters within 24 GB: the only gradient buffer, and updates of 140 s beside arithmetic of 117."""
    work, machine = gpt("175b", 96, 12288), lohan_machine()
    budgets = Budgets(24 * 10**9, 230 * 10**9)
    plan = make_simulated_plan(work, machine, budgets, batch_samples=16)
    assert plan.update == "mixed"
    assert not plan.held_blocks
    others = [
        make_simulated_plan(work, machine, budgets, {"update": update}, batch_samples=16)
        for update in ("backward", "deferred")
    ]
    step_s, *others_s = (simulate_plan(p, work, machine).step_s for p in (plan, *others))
    assert step_s < 0.9 * min(others_s)


@pytest.mark.parametrize(
    ("fixed", "clips", "batch"),
    [({"update": "backward"}, False, 16), ({}, True, 16), ({}, False, 32), ({"deferred_fraction": 1.0}, False, 16)],
)  # fmt: skip
def test_no_plan_is_mixed_where_the_user_decides_or_arithmetic_takes_longer(fixed, clips, batch) -> None:
    budgets = Budgets(24 * 10**9, 230 * 10**9, clips_gradients=clips)
    plan = make_plan(gpt("175b", 96, 12288), lohan_machine(), budgets, fixed, batch_samples=batch)
    assert plan.update != "mixed"


def test_clipping_defers_every_update_and_contradicts_backward() -> None:
    work, machine = gpt("small", 4, 128, tokens=64, vocab=200), small_machine(1, False)
    budgets = Budgets(80 * MB, 60 * MB, clips_gradients=True)
    assert make_plan(work, machine, budgets, batch_samples=2).update == "deferred"
    with pytest.raises(ConfigError, match="global gradient norm"):
        make_plan(work, machine, budgets, {"update": "backward"}, batch_samples=2)


def test_a_refusal_names_changes_that_do_help() -> None:
    work, machine = gpt("small", 4, 128, tokens=64, vocab=200), small_machine(1, False)
    plenty = Budgets(80 * MB, 60 * MB, staging_nbytes=STAGING)
    least = lower_bounds([Search(work, machine, plenty, {}, 8)])
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


@pytest.mark.slow
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
    """175B on 24 GB: a second buffer of 7.25 GB does not fit, and the first is emptied over the bus 95 times; three
    quarters of what a block's last micro-batch and the next one's first compute hide it, and what is recomputed."""
    work, machine = gpt("175b", 96, 12288), lohan_machine()
    budgets = Budgets(24 * 10**9, 256 * 10**9)
    plan = make_plan(work, machine, budgets, {"micro_batches": 16}, batch_samples=16)
    assert plan.n_grad_buffers == 1
    copied_s = 4 * work.blocks[0].trainable_numel / 24.8e9
    forward = work.blocks[0].flops_per_sample
    recomputed = (plan.predicted.hardware_flops - plan.predicted.model_flops) / 96 / 16
    hidden_s = (1.5 * 2 * forward + recomputed) / 148.68e12
    assert plan.predicted.exposed_seconds["gradient"] == pytest.approx(95 * (copied_s - hidden_s))
    assert hidden_s > 0.2 * copied_s
    why = explain(plan, work, machine, budgets)
    assert any("a second one takes 7.25GB of device memory" in line for line in why.lines(plan))

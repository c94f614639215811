"""The simulator with LoHan's machine, policy and 14-byte state against LoHan's published throughput."""

from __future__ import annotations

import pytest

from offload.planner.peers import lohan_plan, lohan_workload
from offload.planner.plan import Budgets
from offload.planner.search import make_plan
from offload.schedule.run import SimulatedStep, simulate_plan
from tests.planning import PUBLISHED_ROWS, gpt, lohan_machine

WORK = gpt("13b", 40, 5120)


def as_lohan(batch: int, drives: int) -> SimulatedStep:
    work, machine = lohan_workload(WORK), lohan_machine(drives)
    return simulate_plan(lohan_plan(work, machine, batch_samples=batch), work, machine)


@pytest.mark.parametrize(("batch", "drives", "published_tflops"), PUBLISHED_ROWS)
def test_published_rows_are_met_within_15_percent(batch, drives, published_tflops) -> None:
    assert as_lohan(batch, drives).hardware_tflops == pytest.approx(published_tflops, rel=0.15)


def test_the_machine_has_no_fixed_overhead() -> None:
    assert lohan_machine().step_overhead_s == 0.0


def test_lohan_moves_16_bytes_and_writes_14_a_parameter() -> None:
    """Whole blocks and the root; the root's parameters stay on the device, three blocks' in DRAM at the turns."""
    step = as_lohan(8, 12)
    blocks = sum(b.trainable_numel for b in WORK.blocks)
    root = WORK.root_trainable_numel
    assert step.read_nbytes == pytest.approx(16 * blocks - 2 * 2 * blocks * 3 / 40 + 12 * root)
    assert step.written_nbytes == pytest.approx(14 * blocks + 12 * root)


@pytest.mark.parametrize(
    ("batch", "drives"),
    [
        (8, 12),
        pytest.param(16, 12, marks=pytest.mark.slow),
        (48, 1),
        pytest.param(48, 2, marks=pytest.mark.slow),
    ],
)
def test_this_library_is_faster_on_the_same_machine_where_it_is_not_arithmetic_that_limits(
    batch, drives
) -> None:
    """Same rates, same memory: fewer bytes a parameter, read, arithmetic and write overlapped, spare DRAM used."""
    machine = lohan_machine(drives)
    budgets = Budgets(machine.device_memory_nbytes, machine.host_memory_nbytes)
    ours = simulate_plan(make_plan(WORK, machine, budgets, batch_samples=batch), WORK, machine)
    assert ours.step_s < 0.8 * as_lohan(batch, drives).step_s

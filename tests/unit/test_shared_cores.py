"""Where the device computes in host memory: what computing, updating and storing take from each other."""

from __future__ import annotations

import pytest

from offload.planner.cost_model import CostModel
from offload.planner.plan import SPLIT_MASTER
from offload.planner.workload import peak_of
from offload.profiling.working_set import envelope
from offload.schedule.operations import Operation
from offload.schedule.simulator import simulate
from tests.planning import gpt, lohan_machine
from tests.unit.test_cost_model import load
from tests.unit.test_simulator import op, rates


@pytest.mark.parametrize(
    ("compute_s", "update_s", "expected_s"),
    [
        (3.0, 2.0, 3.0 / 0.6 + 0.0),  # both end together: 5 s at 0.6 and 0.4
        (6.0, 2.0, 5.0 + 3.0),  # the update ends after 5 s; 3 s of computing are left
        (3.0, 4.0, 5.0 + 2.0),
    ],
)
def test_formula_and_simulator_share_the_cores_alike(compute_s, update_s, expected_s) -> None:
    shared = rates(shares_host=True, compute_beside_update=0.6, update_beside_compute=0.4)
    timeline = simulate([op("compute", compute_s), op("cpu", update_s)], shared)
    assert timeline.total_s == pytest.approx(expected_s)
    assert shared.shared_cores_s(compute_s, update_s, 0.0) == pytest.approx(expected_s)


def test_computing_is_slower_while_the_drives_are_busy() -> None:
    shared = rates(shares_host=True, compute_beside_storage=0.5)
    timeline = simulate([op("compute", 2.0), op("read", 1.0)], shared)
    assert timeline.end_s == pytest.approx([2.5, 1.0])
    assert shared.shared_cores_s(2.0, 0.0, 1.0) == pytest.approx(2.5)
    apart = simulate([op("compute", 2.0), op("read", 1.0)], rates(compute_beside_storage=0.5))
    assert apart.end_s == pytest.approx([2.0, 1.0])


def test_every_kind_of_work_has_its_own_rate() -> None:
    own = rates(flops_per_s=4.0, work_flops_per_s={"forward": 2.0, "root_backward": 1.0})
    operations = [
        Operation("forward", "compute", "forward 0", 4.0, block=0),
        Operation("backward", "compute", "backward 0", 4.0, (0,), block=0),
        Operation("backward", "compute", "backward root", 4.0, (1,)),
    ]
    assert simulate(operations, own).end_s == pytest.approx([2.0, 3.0, 7.0])


def test_the_cost_model_uses_the_same_rates() -> None:
    work = gpt("small", 4, 256, tokens=64, vocab=1000)
    machine = lohan_machine(1).model_copy(update={"matmul_flops_per_s": {"bfloat16": 1e12}})
    slower = machine.model_copy(
        update={
            "work_flops_per_s": {
                "forward": 5e11,
                "recompute": 2.5e11,
                "backward": 1e11,
                "root_backward": 2e11,
            }
        }
    )
    blocks = 4 * sum(b.flops_per_sample for b in work.blocks)
    root = 4 * work.root_flops_per_sample
    fast, slow = (
        CostModel(work, m, SPLIT_MASTER, 4).cost(load(recompute_flops=1e9)) for m in (machine, slower)
    )
    assert fast.forward["compute"] == pytest.approx((blocks + root) / 1e12)
    assert slow.forward["compute"] == pytest.approx(blocks / 5e11 + root / 1e12)
    # What a block does beside its products it does again in full, however few of these are recomputed.
    again = 1e9 / 1e12 + blocks * (1 / 2.5e11 - 1 / 1e12)
    assert slow.backward["compute"] == pytest.approx(2 * blocks / 1e11 + 2 * root / 2e11 + again)


def test_the_envelope_is_the_peak_for_any_number_of_samples() -> None:
    """Operations whose live bytes are fixed + n * grown, in some order; none that is never the peak is kept."""
    lines = [(0, 10), (100, 4), (30, 8), (20, 4), (500, 0), (0, 9)]
    histories = [[fixed + n * grown for fixed, grown in lines] for n in (2, 3)]
    kept = envelope(*histories)
    assert set(kept) == {(0, 10), (100, 4), (30, 8), (500, 0)}
    for n in (1, 2, 5, 12, 40, 200):
        assert peak_of(kept, n) == max(fixed + n * grown for fixed, grown in lines)
    assert envelope([1, 2], [1, 2, 3]) == ()
    assert peak_of((), 3) is None

"""The simulator against simpy on random lists, and against closed formulas where things are shared."""

from __future__ import annotations

import random

import pytest
import simpy

from offload.planner.rates import BusRates, Rates, StorageRates
from offload.schedule.operations import LANES, Operation
from offload.schedule.run import stalls
from offload.schedule.simulator import SimulationError, fair_shares, simulate


def rates(**changes) -> Rates:
    """Everything at one unit a second, nothing shared that does not have to be."""
    values = dict(
        flops_per_s=1.0,
        bus=BusRates(1.0, 1.0, 1.0, 1.0),
        storage=StorageRates(1.0, 1.0, 1.0, 1.0, 2.0),
        dram_bytes_per_s=1e18,
        update_params_per_s=1.0,
        shares_host=False,
    )
    return Rates(**{**values, **changes})


def op(lane: str, amount: float, *after: int, **more) -> Operation:
    kind = {
        "compute": "forward",
        "h2d": "load",
        "d2h": "swap_out",
        "read": "fetch",
        "write": "spill",
        "cpu": "update",
    }
    return Operation(kind[lane], lane, f"{kind[lane]} 0", amount, after, **more)


def random_list(seed: int, n: int) -> list[Operation]:
    """Amounts are arbitrary real numbers, so no two events coincide."""
    draw = random.Random(seed)
    return [
        op(
            draw.choice(LANES),
            draw.uniform(0.1, 5.0),
            *sorted(draw.sample(range(i), min(i, draw.randint(0, 3)))),
        )
        for i in range(n)
    ]


def simpy_ends(operations: list[Operation]) -> list[float]:
    """The same list in simpy: a server per lane that takes the first of the list among those waiting."""
    world = simpy.Environment()
    waiting: dict[str, list[int]] = {lane: [] for lane in LANES}
    bell = {lane: world.event() for lane in LANES}
    done = [world.event() for _ in operations]
    ends = [0.0] * len(operations)

    def arrive(index: int, operation: Operation):
        for before in operation.after:
            yield done[before]
        waiting[operation.lane].append(index)
        if not bell[operation.lane].triggered:
            bell[operation.lane].succeed()

    def serve(lane: str):
        while True:
            yield world.timeout(0)  # whoever arrives at this very moment is there before the choice
            if not waiting[lane]:
                bell[lane] = world.event()
                yield bell[lane]
                continue
            index = min(waiting[lane])
            waiting[lane].remove(index)
            yield world.timeout(operations[index].amount)
            ends[index] = world.now
            done[index].succeed()

    for index, operation in enumerate(operations):
        world.process(arrive(index, operation))
    for lane in LANES:
        world.process(serve(lane))
    world.run()
    return ends


@pytest.mark.parametrize("seed", range(60))
def test_without_sharing_the_times_are_those_of_simpy(seed: int) -> None:
    operations = random_list(seed, 5 + seed)
    assert simulate(operations, rates()).end_s == pytest.approx(simpy_ends(operations))


def test_reads_and_writes_of_a_drive_add() -> None:
    storage = StorageRates(drive_read=2.0, drive_write=1.0, read=2.0, write=1.0, capacity=1.0)
    timeline = simulate([op("read", 4.0), op("write", 6.0)], rates(storage=storage))
    assert timeline.total_s == pytest.approx(4.0 / 2.0 + 6.0 / 1.0)
    assert timeline.end_s[0] == pytest.approx(4.0)  # half of the drive's time until the read is over


def test_a_drive_that_mixes_well_overlaps_them() -> None:
    """1.5 drive seconds a second: 0.75 of each rate while both run; the read of 3 ends at 4 s, the write goes on."""
    storage = StorageRates(1.0, 1.0, 1.0, 1.0, capacity=1.5)
    timeline = simulate([op("read", 3.0), op("write", 6.0)], rates(storage=storage))
    assert timeline.end_s == pytest.approx([4.0, 4.0 + 3.0])


def test_what_a_slow_link_leaves_of_the_drives_goes_to_the_other_direction() -> None:
    storage = StorageRates(drive_read=10.0, drive_write=10.0, read=1.0, write=10.0, capacity=1.0)
    timeline = simulate([op("read", 1.0), op("write", 9.0)], rates(storage=storage))
    assert timeline.end_s == pytest.approx([1.0, 1.0])


def test_both_directions_of_the_bus_run_at_their_duplex_rates() -> None:
    bus = BusRates(h2d=4.0, d2h=4.0, h2d_duplex=1.0, d2h_duplex=2.0)
    timeline = simulate([op("h2d", 10.0), op("d2h", 4.0)], rates(bus=bus))
    assert timeline.end_s == pytest.approx([2.0 + (10.0 - 2.0) / 4.0, 2.0])
    assert timeline.total_s == pytest.approx(bus.seconds(10.0, 4.0))


def test_dram_is_shared_fairly_and_its_bytes_set_the_pace() -> None:
    """Wanted: 1 and 4 bytes/s of DRAM, 3 there: the small one gets its 1, the other 2, half its speed."""
    operations = [op("read", 10.0, dram_nbytes=10.0), op("cpu", 10.0, dram_nbytes=40.0)]
    timeline = simulate(operations, rates(dram_bytes_per_s=3.0))
    # alone the update would take 40/3 s; with the read beside it, 20 of its 40 bytes are done when the read ends
    assert timeline.end_s == pytest.approx([10.0, 10.0 + 20.0 / 3.0])


def test_fair_shares_hand_on_what_is_left() -> None:
    shares = fair_shares({"read": 1.0, "write": 5.0, "cpu": 9.0}, 11.0)
    assert shares == pytest.approx({"read": 1.0, "write": 5.0, "cpu": 5.0})


def test_computing_and_updating_share_the_cores_where_the_device_is_dram() -> None:
    timeline = simulate([op("compute", 4.0), op("cpu", 1.0)], rates(shares_host=True))
    assert timeline.end_s == pytest.approx([5.0, 2.0])


def test_an_operation_waits_for_memory_and_a_smaller_one_passes() -> None:
    operations = [
        op("compute", 5.0, acquires=(("device", 8),), releases=(("device", 8),)),
        op("h2d", 1.0, acquires=(("device", 4),)),
        op("h2d", 1.0, acquires=(("device", 2),)),
    ]
    timeline = simulate(operations, rates(), limit_nbytes={"device": 10})
    assert timeline.start_s == pytest.approx([0.0, 5.0, 0.0])
    assert timeline.peak_nbytes("device") == 10
    free = simulate(operations, rates())
    assert free.peak_nbytes("device") == 14


def test_what_can_never_start_is_named() -> None:
    operations = [op("h2d", 1.0, acquires=(("device", 4),)), op("h2d", 1.0, 0, acquires=(("device", 7),))]
    with pytest.raises(SimulationError, match="load 0 can never start: it wants 7 bytes of device"):
        simulate(operations, rates(), limit_nbytes={"device": 10})


def test_an_operation_may_not_wait_for_a_later_one() -> None:
    with pytest.raises(SimulationError, match="not before it"):
        simulate([op("h2d", 1.0, 1), op("h2d", 1.0)], rates())


def test_each_gap_of_the_device_is_charged_to_what_ended_last() -> None:
    operations = [
        op("read", 3.0),
        op("compute", 2.0, 0),  # waits 3 s for the fetch
        op("d2h", 4.0, 1),
        op("compute", 1.0, 0, 2),  # waits 4 s for the swap-out
    ]
    timeline = simulate(operations, rates())
    assert stalls(operations, timeline, 0.0, timeline.total_s) == pytest.approx(
        {"fetch": 3.0, "activation": 4.0}
    )

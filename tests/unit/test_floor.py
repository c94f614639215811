"""The floor of a step is arithmetic: these are its cases worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import StoreError
from offload.planner.floor import FloorMeter, StorageRates, at_least_as_seen, floor_s, storage_s
from offload.tiers.rates import measure_rates

RATES = StorageRates(read_bytes_per_s=2e9, write_bytes_per_s=1e9)


def test_reads_and_writes_share_the_drives_time():
    assert storage_s(4e9, 3e9, RATES) == 2 + 3


@pytest.mark.parametrize(("arithmetic_s", "expected_s"), [(1.0, 5.0), (7.0, 7.0)])
def test_the_floor_is_the_larger_of_arithmetic_and_storage(arithmetic_s, expected_s):
    assert floor_s(arithmetic_s, 4e9, 3e9, RATES) == expected_s


def test_without_storage_the_floor_is_arithmetic():
    assert floor_s(1.5, 0, 0, None) == 1.5


def test_rates_rise_in_proportion_when_a_step_was_faster_than_they_allow():
    assert at_least_as_seen(RATES, 4e9, 3e9, 2.5) == StorageRates(4e9, 2e9)
    assert at_least_as_seen(RATES, 4e9, 3e9, 5.0) == RATES
    assert at_least_as_seen(RATES, 4e9, 3e9, 50.0) == RATES
    assert at_least_as_seen(RATES, 4e9, 3e9, 0.0) == RATES


def test_a_run_worked_by_hand():
    meter = FloorMeter(RATES)
    first = meter.step(step_s=10, stalls_s=2, read_bytes=4e9, written_bytes=3e9)  # arithmetic 8 > storage 5
    assert (first.floor_s, first.fraction) == (8, 0.8)
    second = meter.step(step_s=6, stalls_s=3, read_bytes=4e9, written_bytes=3e9)  # arithmetic 3 < storage 5
    assert (second.floor_s, second.fraction) == (5, pytest.approx(5 / 6))
    third = meter.step(
        step_s=4, stalls_s=1, read_bytes=4e9, written_bytes=3e9
    )  # the drives do 5/4 of the measured rate
    assert (third.floor_s, third.fraction) == (4, 1)
    fourth = meter.step(
        step_s=8, stalls_s=0, read_bytes=4e9, written_bytes=3e9
    )  # the fastest arithmetic stays
    assert (fourth.floor_s, fourth.fraction) == (pytest.approx(4), pytest.approx(0.5))


seconds = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(seconds, st.floats(0, 2), st.floats(0, 1e12), st.floats(0, 1e12)), min_size=1))
def test_a_step_never_beats_its_floor(steps):
    meter = FloorMeter(RATES)
    for step_s, stall_share, read, written in steps:
        floor = meter.step(step_s, step_s * stall_share, read, written)
        assert 0 <= floor.fraction <= 1
        assert floor.floor_s <= step_s * (1 + 1e-9)


@pytest.mark.parametrize("n_drives", [1, 2])
def test_rates_are_measured_on_a_scratch_store_that_is_removed(tmp_path, n_drives):
    drives = [tmp_path / str(i) for i in range(n_drives)]
    read, written = measure_rates([str(drive) for drive in drives], nbytes_per_drive=4 << 20)
    assert read > 1e6
    assert written > 1e6
    assert [list(drive.iterdir()) for drive in drives] == [[]] * n_drives


def test_measuring_is_bounded_in_time_on_a_slow_drive(tmp_path, monkeypatch):
    """20 ms a block: 64 MiB would take 1.3 s a pass, and its rate is 50 blocks a second."""
    from tests.fault.training import inject

    inject(monkeypatch, {"delay_ms": 20})
    read, written = measure_rates([str(tmp_path)], seconds_max=0.1, queue_depth=1)
    assert 20e6 < read < 55e6
    assert 20e6 < written < 55e6


def test_a_directory_that_cannot_be_measured_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        measure_rates([str(tmp_path / "file" / "store")])

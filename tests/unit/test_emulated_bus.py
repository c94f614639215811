"""The bus of an emulated device: never faster than its rate, and back at it after a copy that was late."""

import time

import pytest
import torch

from offload.tiers.emulated_device import EmulatedDevice

RATE, NBYTES = 1e8, 6_000_000
COPY_S = NBYTES / RATE
LATE_S = COPY_S * 0.7


@pytest.fixture
def first_copy_is_late(monkeypatch):
    sleep, n_slept = time.sleep, []

    def late(seconds):
        n_slept.append(seconds)
        sleep(seconds + (LATE_S if len(n_slept) == 1 else 0))

    monkeypatch.setattr("offload.tiers.emulated_device.time.sleep", late)


@pytest.mark.parametrize("at_once", [False, True])
def test_only_copies_that_were_waiting_make_up_for_a_late_one(first_copy_is_late, at_once):
    device = EmulatedDevice(RATE)
    source, target = (torch.zeros(NBYTES, dtype=torch.uint8) for _ in range(2))
    first = device.copy_in(target, source)
    if not at_once:
        first.wait()
    second = device.copy_in(target, source)
    second.wait()
    device.close()
    begin_s, end_s = second.times()
    assert first.times()[1] - first.times()[0] >= COPY_S + LATE_S
    if at_once:
        assert end_s - begin_s < COPY_S  # it takes what is left of the time of both
        assert end_s - first.times()[0] >= 2 * COPY_S
    else:
        assert end_s - begin_s >= COPY_S

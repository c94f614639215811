"""Reads are verified by default, until measuring shows that it takes more than three hundredths of a step."""

from __future__ import annotations

import logging

import pytest

from offload.runtime import verification
from offload.runtime.verification import STEPS_MEASURED, Verification


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by only when told to."""
    now = [0.0]
    monkeypatch.setattr(verification.time, "perf_counter", lambda: now[0])
    return now


def steps(made, clock, spent, share, n=STEPS_MEASURED):
    """`n` steps of two seconds, of which `share` goes into verifying. Whether it was given up in one of them."""
    gave_up = []
    for _ in range(n):
        clock[0] += 2.0
        spent[0] += 2.0 * share
        gave_up.append(made.step_ended())
    return gave_up


@pytest.mark.parametrize(("share", "stays"), [(0.0, True), (0.029, True), (0.031, False), (0.5, False)])
def test_what_costs_three_percent_stays_and_what_costs_more_goes(clock, caplog, share, stays):
    spent = [0.0]
    made = Verification("auto", lambda: spent[0])
    assert made.on
    steps(made, clock, spent, share=0.9, n=1)  # the first step is another kind of step: it does not count
    with caplog.at_level(logging.WARNING):
        gave_up = steps(made, clock, spent, share)
    assert made.cost == pytest.approx(share)
    assert made.on is stays
    assert gave_up.count(True) == (not stays)
    assert ("verify_reads=True keeps it" in caplog.text) is not stays
    assert steps(made, clock, spent, share=0.9, n=9) == [False] * 9  # decided once
    assert made.on is stays


@pytest.mark.parametrize("asked", [True, False])
def test_what_was_asked_for_is_not_decided_again(clock, asked):
    spent = [0.0]
    made = Verification(asked, lambda: spent[0])
    steps(made, clock, spent, share=0.9, n=3 * STEPS_MEASURED)
    assert made.on is asked
    assert made.cost is None

"""The analysis of a profiler's trace finds the gaps, copies and calls that were put into a made-up one."""

from __future__ import annotations

import pathlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

from trace_analysis import STEP, analyse, intersection, length, union

LAUNCHER, WAITER = 1, 2
COMPUTE, H2D, D2H = 7, 13, 14


class Made:
    """A trace being made; times in microseconds."""

    def __init__(self):
        self.events, self._n = [], 0

    def mark(self, name, start, end, tid=LAUNCHER):
        self._add("user_annotation", name, start, end, tid)

    def kernel(self, start, end, launched, stream=COMPUTE):
        self._n += 1
        self._add(
            "cuda_runtime", "cudaLaunchKernel", launched, launched + 1, LAUNCHER, {"correlation": self._n}
        )
        self._add("kernel", f"k{self._n}", start, end, stream, {"correlation": self._n, "stream": stream})

    def copy(self, way, start, end, nbytes, kind="Pinned"):
        stream = H2D if way == "HtoD" else D2H
        self._add(
            "gpu_memcpy", f"Memcpy {way} ({kind} -> Device)", start, end, stream, {"bytes": nbytes, "stream": stream}
        )  # fmt: skip

    def call(self, name, start, end, tid=LAUNCHER):
        self._add("cuda_runtime", name, start, end, tid)

    def _add(self, category, name, start, end, tid, args=None):
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args or {}}
        )  # fmt: skip


@pytest.fixture
def made():
    """Three steps of 1000 us on the device; the launching thread is 500 us ahead of it. In the second step: 20 us
    between two blocks, 30 inside one, 50 at the turn to the third."""
    trace = Made()
    for number in range(3):
        at, host = 1000 + 1000 * number, 500 + 1000 * number
        trace.mark(STEP, host, host + 1000)
        trace.mark("offload forward layers.0", host + 10, host + 100)
        trace.mark("offload backward layers.1", host + 100, host + 200)
        trace.kernel(at, at + 300, host + 20)
        trace.kernel(at + 320, at + 600, host + 120)
        trace.kernel(at + 630, at + 950, host + 130)
    return trace


def test_gaps_are_found_and_told_apart_by_where_they_are(made):
    found = analyse(made.events)
    assert found["step_s"] == pytest.approx(1e-3)
    assert found["gap_share"] == pytest.approx(0.100)
    assert found["between_blocks_share"] == pytest.approx(0.020)
    assert found["turn_share"] == pytest.approx(0.050)
    assert [gap["seconds"] for gap in found["longest_gaps"]] == pytest.approx([50e-6, 30e-6, 20e-6])
    assert found["longest_gaps"][1]["after"].startswith("backward layers.1: ")
    assert found["compute_s"] == pytest.approx(0.9e-3)


def test_the_roots_kernels_belong_to_the_turn_on_both_of_its_sides(made):
    """Of the embedding before the first block 10 us apart, of the root after the last one 5 us apart."""
    made.kernel(1970, 1975, 1501)  # launched in the second step, whose first kernel it is
    made.kernel(1980, 1990, 1502)
    made.kernel(2955, 2960, 2499)
    found = analyse(made.events)
    assert found["step_s"] == pytest.approx(1.030e-3)
    assert found["turn_share"] == pytest.approx((5 + 10 + 5 + 40) / 1030)
    assert found["between_blocks_share"] == pytest.approx(20 / 1030)
    within_a_block = 30 / 1030
    assert found["gap_share"] == pytest.approx(
        found["turn_share"] + found["between_blocks_share"] + within_a_block
    )


def test_steps_without_blocks_of_this_library_have_no_turn(made):
    """Plain torch has none of the ranges that name blocks."""
    made.events = [e for e in made.events if not e["name"].startswith("offload ")]
    found = analyse(made.events)
    assert found["gap_share"] == pytest.approx(0.1)
    assert found["turn_share"] is None
    assert found["between_blocks_share"] is None


def test_what_another_stream_computes_meanwhile_fills_no_gap(made):
    made.kernel(2300, 2320, 1620, stream=H2D)
    assert analyse(made.events)["gap_share"] == pytest.approx(0.1)
    made.kernel(2295, 2325, 1620)
    assert analyse(made.events)["gap_share"] == pytest.approx(0.08)


def test_copies_are_measured_one_way_both_ways_and_beside_computing(made):
    made.copy("HtoD", 2100, 2200, 1000)
    made.copy("DtoH", 2150, 2310, 500)
    made.copy("HtoD", 1100, 1900, 9999)  # in the first step
    made.copy("DtoH", 2700, 2710, 8, kind="Pageable")
    found = analyse(made.events)
    assert (found["h2d_s"], found["d2h_s"]) == pytest.approx((100e-6, 170e-6))
    assert found["both_ways_s"] == pytest.approx(50e-6)
    assert (found["h2d_bytes"], found["d2h_bytes"]) == (1000, 508)
    assert found["copies_beside_compute_share"] == pytest.approx((100 + 110 - 10 + 10) / (210 + 10))
    assert (found["pageable_copies"], found["pageable_bytes"]) == (1, 8)


def test_calls_are_counted_in_the_step_by_who_makes_them(made):
    made.call("cudaStreamSynchronize", 1700, 1750)
    made.call("cudaMalloc", 1800, 1801)
    made.call("cudaMalloc", 600, 601)  # the first step
    made.call("cudaEventSynchronize", 1700, 2300, tid=WAITER)
    made.call("cudaEventRecord", 1710, 1711)
    found = analyse(made.events)
    assert found["calls"] == {"cudaStreamSynchronize": 1, "cudaMalloc": 1}
    assert found["calls_elsewhere"] == {"cudaEventSynchronize": 1}
    assert found["waited_in_calls_s"] == pytest.approx(50e-6)


def test_a_trace_without_a_gpu_has_only_calls_and_one_without_steps_is_refused():
    trace = Made()
    for number in range(3):
        trace.mark(STEP, 100 * number, 100 * number + 90)
    assert analyse(trace.events) == {"calls": {}, "calls_elsewhere": {}, "waited_in_calls_s": 0.0}
    with pytest.raises(ValueError, match="0 ranges"):
        analyse([])


intervals = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))
)


@given(intervals, intervals)
def test_unions_and_intersections_are_those_of_the_sets_of_moments(ones, others):
    def moments(found):
        return {moment for start, end in found for moment in range(start, end)}

    left, right = union(ones), union(others)
    assert moments(left) == moments(ones)
    assert length(left) == len(moments(ones))
    both = intersection(left, right)
    assert moments(both) == moments(ones) & moments(others)
    assert length(both) == len(moments(both))


def test_a_copy_inside_device_memory_on_the_computing_stream_is_work(made):
    before = analyse(made.events)["gap_share"]
    made._n += 1
    at = {"correlation": made._n, "stream": COMPUTE}
    made._add("cuda_runtime", "cudaMemcpyAsync", 1631, 1632, LAUNCHER, {"correlation": made._n})
    made._add("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 2302, 2312, COMPUTE, at)
    assert analyse(made.events)["gap_share"] == pytest.approx(before - 0.010)


def test_gaps_are_told_apart_by_what_they_waited_for(made):
    made.copy("HtoD", 2200, 2319, 1000)  # ends as the second block goes on
    made.mark("offload wait for update", 2500, 2955)  # the launching thread waited for an update at the turn
    causes = analyse(made.events)["gap_s_by_cause"]
    assert causes["h2d"] == pytest.approx(20e-6)
    assert causes["update"] == pytest.approx(50e-6)
    assert causes["launch"] == pytest.approx(30e-6)

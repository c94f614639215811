"""The split-master codec is a bijection on all 2^32 patterns. See docs/adr/0003-split-master.md."""

import threading
import time

import numpy as np
import pytest

from offload import _C

LEVELS = _C.simd_levels()
COUNTS = [0, 1, 7, 8, 15, 16, 17, 1023, 4096]


def split(bits, level="auto"):
    hi, lo = np.empty(bits.size, np.uint16), np.empty(bits.size, np.int16)
    _C.split_master(bits.ctypes.data, hi.ctypes.data, lo.ctypes.data, bits.size, level)
    return hi, lo


def merge(hi, lo, level="auto"):
    out = np.empty(hi.size, np.uint32)
    _C.merge_master(hi.ctypes.data, lo.ctypes.data, out.ctypes.data, hi.size, level)
    return out


def as_float(hi):
    return (hi.astype(np.uint32) << 16).view(np.float32)


def patterns_that_matter():
    """Every upper half with the lower halves around a tie, so every NaN and infinity top, and a random sample."""
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    sample = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([(tops[:, None] | lows).ravel(), sample])


@pytest.mark.slow
def test_round_trip_over_every_32_bit_pattern():
    step = 1 << 24
    ramp = np.arange(step, dtype=np.uint32)
    for start in range(0, 1 << 32, step):
        bits = ramp + np.uint32(start)
        assert np.array_equal(merge(*split(bits)), bits), f"in {start:#x}..{start + step:#x}"


@pytest.mark.parametrize("level", LEVELS)
def test_round_trip_over_ties_nans_infinities_and_a_sample(level):
    bits = patterns_that_matter()
    assert np.array_equal(merge(*split(bits, level), level), bits)


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("n", COUNTS)
def test_every_instruction_set_splits_and_merges_as_scalar_does(level, n):
    bits = np.random.default_rng(n).integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
    expected, got = split(bits, "scalar"), split(bits, level)
    assert np.array_equal(got[0], expected[0])
    assert np.array_equal(got[1], expected[1])
    assert np.array_equal(merge(*got, level), bits)


def test_hi_is_the_nearest_bfloat16_with_ties_away_from_zero():
    bits = np.random.default_rng(1).integers(0, 0x7F7F8000, 1 << 18, dtype=np.uint64).astype(np.uint32)
    bits[:1000] = (bits[:1000] % 0x7F7F0000 & 0xFFFF0000) | 0x8000
    signs = np.random.default_rng(2).integers(0, 2, bits.size, dtype=np.uint32) << 31
    hi, _ = split(bits | signs)
    value = bits.view(np.float32).astype(np.float64)
    below = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    above = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    expected = np.where(above - value <= value - below, above, below)
    finite = np.isfinite(above)
    got = np.where(signs != 0, -1, 1) * as_float(hi).astype(np.float64)
    assert np.array_equal(got[finite], expected[finite])


def test_a_finite_master_never_has_a_nan_hi_and_an_infinity_stays_one():
    bits = patterns_that_matter()
    values, served = bits.view(np.float32), as_float(split(bits)[0])
    assert not np.isnan(served[np.isfinite(values)]).any()
    infinite = np.isinf(values)
    assert np.array_equal(served[infinite], values[infinite])


def test_a_canonical_nan_master_is_served_as_a_nan_where_a_raw_one_may_not_be():
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000, 0x7F800001, 0x7FC00000, 0x7F800000], dtype=np.uint32)
    assert not np.isnan(as_float(split(bits)[0])[:3]).any()  # the carry runs into the sign: zeros
    _C.canonicalize_nan(bits.ctypes.data, bits.size)
    assert bits.tolist() == [0x7FC00000] * 5 + [0x7F800000]
    assert np.isnan(as_float(split(bits)[0])[:5]).all()


def test_an_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(ValueError, match="sse9"):
        _C.split_master(0, 0, 0, 0, "sse9")


def test_another_thread_goes_on_while_nans_are_made_canonical():
    values = np.zeros(1 << 24, np.float32)
    begun_s, ended_s = [], []

    def work():
        begun_s.append(time.perf_counter())
        for _ in range(4):
            _C.canonicalize_nan(values.ctypes.data, values.size)
        ended_s.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    turns_s = []
    while not ended_s:
        turns_s.append(time.perf_counter())
        time.sleep(0)
    thread.join()
    took_s = ended_s[0] - begun_s[0]
    assert sum(begun_s[0] < turn_s < ended_s[0] for turn_s in turns_s) > 20, took_s

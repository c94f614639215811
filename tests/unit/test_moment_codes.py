"""8-bit moments at every instruction set: values and codes of a search through the map, bit for bit."""

import numpy as np
import pytest

from offload import _C

LEVELS = _C.simd_levels()
PLANES = ["int8", "uint8"]
SUBNORMAL, SMALLEST, LARGEST = np.float32(1e-45), np.float32(2.0**-126), np.finfo(np.float32).max
SCALES = np.array(
    [0, SUBNORMAL, 1e-39, SMALLEST, 3e-38, 1e-20, 0.3, 1, 1.9999999, 7e9, 2.0**126, 2e38, LARGEST, np.inf, np.nan],
    dtype=np.float32,
)  # fmt: skip


def the_map(plane):
    """(values, middles between neighbours): what is on a middle goes down."""
    values = np.array(_C.quant_map(plane == "int8"), dtype=np.float32)
    return values, (values[:-1] + values[1:]) / np.float32(2)


def quantise(plane, moments, level):
    codes, absmax = np.zeros(moments.size, np.uint8), np.zeros(-(-moments.size // 256), np.float32)
    _C.quantise(plane, moments.ctypes.data, codes.ctypes.data, absmax.ctypes.data, moments.size, level)
    return codes, absmax


def dequantise(plane, codes, absmax, level):
    moments = np.zeros(codes.size, np.float32)
    _C.dequantise(plane, codes.ctypes.data, absmax.ctypes.data, moments.ctypes.data, codes.size, level)
    return moments


def searched(plane, moments, scales):
    """The codes of `moments`, whose blocks have these scales: how many middles are below the share of the scale."""
    with np.errstate(all="ignore"):
        shares = moments / np.where(scales == 0, np.float32(1), scales)
        codes = np.searchsorted(the_map(plane)[1], shares)
    codes[np.isnan(shares)] = 0
    if plane == "uint8":
        codes[(codes == 0) & (moments > 0)] = 1  # a second moment above zero stays above it
    return codes


def in_blocks(moments, scale):
    """Blocks of 256 that begin with their largest magnitude."""
    rest = np.zeros(-(-moments.size // 255) * 255, np.float32)
    rest[: moments.size] = moments
    return np.hstack([np.full((rest.size // 255, 1), scale), rest.reshape(-1, 255)]).ravel()


def neighbours(values, count):
    """The floats up to `count` behind and before each."""
    bits = values.astype(np.float32).view(np.int32)[:, None] + np.arange(-count, count + 1, dtype=np.int32)
    return bits.ravel().view(np.float32)


def same_codes(plane, blocks, scale, level):
    codes, absmax = quantise(plane, blocks, level)
    assert np.array_equal(absmax, np.full(absmax.size, scale), equal_nan=True)
    wrong = np.flatnonzero(codes != searched(plane, blocks, scale))
    assert wrong.size == 0, f"{wrong.size} codes differ, first that of {blocks[wrong[0]]!r} of {scale!r}"


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_code_has_the_value_of_the_map(plane, level):
    codes = np.tile(np.arange(256, dtype=np.uint8), SCALES.size)
    with np.errstate(invalid="ignore"):
        expected = np.repeat(SCALES, 256) * the_map(plane)[0][codes]
    assert np.array_equal(dequantise(plane, codes, SCALES, level), expected, equal_nan=True)
    zeros = expected == 0
    assert np.array_equal(
        np.signbit(dequantise(plane, codes, SCALES, level)[zeros]), np.signbit(expected[zeros])
    )


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("level", LEVELS)
def test_codes_around_every_middle_are_those_of_a_search(plane, level):
    """Where a code changes, with scales whose quotients round every way, and those that no inverse exists of."""
    random = np.random.default_rng(0)
    scales = np.concatenate([SCALES[SCALES > 0][:-2], random.uniform(1, 2, 40).astype(np.float32)])
    middles = the_map(plane)[1]
    for scale in scales:
        with np.errstate(under="ignore", over="ignore"):
            moments = neighbours(np.abs(middles) * scale, 30)
        moments = np.concatenate([moments, -moments]) if plane == "int8" else moments
        same_codes(plane, in_blocks(moments[np.abs(moments) <= scale], scale), scale, level)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scale", SCALES)
def test_codes_of_every_magnitude_are_those_of_a_search(plane, level, scale):
    random = np.random.default_rng(1)
    with np.errstate(all="ignore"):
        moments = np.float32(10.0) ** random.uniform(-10, 0, 255 * 64).astype(np.float32) * scale
        moments = np.where(np.isfinite(moments), moments, np.float32(1))
    moments[:255] = 0
    if plane == "int8":
        moments *= random.choice(np.array([-1, 1], np.float32), moments.size)
    blocks = in_blocks(
        np.minimum(np.abs(moments), scale) * np.sign(moments) if scale == scale else moments, scale
    )
    same_codes(plane, blocks, scale, level)
    assert np.array_equal(
        quantise(plane, -np.zeros(300, np.float32), level)[0], searched(plane, np.zeros(300), 0)
    )


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("level", LEVELS)
def test_blocks_of_any_length_have_the_codes_of_whole_ones(plane, level):
    moments = np.abs(np.random.default_rng(2).standard_normal(600).astype(np.float32))
    moments[0] = moments[256] = moments[512] = 9.0
    codes, _ = quantise(plane, moments, level)
    for n in (1, 7, 8, 15, 16, 31, 33, 63, 65, 127, 129, 255, 257, 511, 599):
        assert np.array_equal(quantise(plane, moments[:n].copy(), level)[0], codes[:n])
        values = dequantise(plane, codes[:n].copy(), np.full(3, 9, np.float32), level)
        assert np.array_equal(values, the_map(plane)[0][codes[:n]] * np.float32(9))


@pytest.mark.slow
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("scale", [1.0, 1.7320508])
def test_codes_of_all_floats_are_those_of_a_search(plane, level, scale):
    """Every float from a thousandth of the least middle to the scale, and its negative where there is a sign."""
    middles, scale = the_map(plane)[1], np.float32(scale)
    first = (np.min(np.abs(middles)) * scale * np.float32(1e-3)).view(np.int32)
    last = scale.view(np.int32)
    for low in range(first, last + 1, 255 << 14):
        moments = np.arange(low, min(low + (255 << 14), last + 1), dtype=np.int32).view(np.float32)
        for sign in (1, -1) if plane == "int8" else (1,):
            blocks = in_blocks(moments * np.float32(sign), scale)
            codes = quantise(plane, blocks, level)[0].reshape(-1, 256)[:, 1:].ravel()[: moments.size]
            ascending = (moments / scale * np.float32(sign))[::sign]
            ends = np.searchsorted(
                ascending, middles, side="right"
            )  # as a search for each, of what is sorted
            expected = np.repeat(np.arange(256), np.diff(ends, prepend=0, append=moments.size))[::sign]
            assert np.array_equal(codes, expected if plane == "int8" else np.maximum(expected, 1))

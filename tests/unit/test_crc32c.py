"""CRC32C of the extension against google-crc32c, at every level."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import _C

LEVELS = _C.crc32c_levels()
LENGTHS = [
    *range(48),
    255,
    256,
    257,
    511,
    512,
    513,
    767,
    768,
    1023,
    1024,
    1025,
    3071,
    3072,
    3073,
    6144,
    65536,
    100_003,
]


def bytes_of(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("level", LEVELS)
def test_the_checksum_is_googles(level):
    for nbytes in LENGTHS:
        data = bytes_of(nbytes + 3, nbytes)
        for start in range(3):  # addresses that are not aligned
            held = data[start : start + nbytes]
            assert _C.crc32c(held.ctypes.data, nbytes, 0, level) == google_crc32c.value(held.tobytes())


@pytest.mark.parametrize("level", LEVELS)
def test_a_checksum_is_continued_over_pieces(level):
    data = bytes_of(10_000)
    for cut in (1, 8, 1000, 5000, 9_999):
        first = _C.crc32c(data.ctypes.data, cut, 0, level)
        whole = _C.crc32c(data.ctypes.data + cut, data.size - cut, first, level)
        assert whole == google_crc32c.value(data.tobytes())


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_checksums_of_pieces_join(one, other):
    joined = _C.crc32c_join(google_crc32c.value(one), google_crc32c.value(other), len(other))
    assert joined == google_crc32c.value(one + other)


def test_checksums_of_long_pieces_join():
    one, other = bytes_of(3_000_001, 1).tobytes(), bytes_of(2_621_440, 2).tobytes()
    joined = _C.crc32c_join(google_crc32c.value(one), google_crc32c.value(other), len(other))
    assert joined == google_crc32c.value(one + other)


def test_a_level_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="by guess is not available"):
        _C.crc32c(bytes_of(8).ctypes.data, 8, 0, "guess")


def test_the_check_value_of_the_standard():
    """RFC 3720, B.4: 32 bytes of zeros, and the usual "123456789"."""
    zeros, digits = np.zeros(32, np.uint8), np.frombuffer(b"123456789", np.uint8)
    assert _C.crc32c(zeros.ctypes.data, 32) == 0x8A9136AA
    assert _C.crc32c(digits.ctypes.data, 9) == 0xE3069283

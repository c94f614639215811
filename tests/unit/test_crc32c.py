"""CRC32C of the extension against google-crc32c, by instruction and by table."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest

from offload import _C

LENGTHS = [0, 1, 7, 8, 9, 15, 1023, 1024, 1025, 3071, 3072, 3073, 6144, 65536, 100_003]


@pytest.mark.parametrize("by_table", [False, True])
@pytest.mark.parametrize("nbytes", LENGTHS)
def test_the_checksum_is_googles(nbytes, by_table):
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes + 3, dtype=np.uint8)
    for start in range(3):  # addresses that are not aligned
        held = data[start : start + nbytes]
        assert _C.crc32c(held.ctypes.data, nbytes, 0, by_table) == google_crc32c.value(held.tobytes())


@pytest.mark.parametrize("by_table", [False, True])
def test_a_checksum_is_continued_over_pieces(by_table):
    data = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
    for cut in (1, 8, 1000, 9_999):
        first = _C.crc32c(data.ctypes.data, cut, 0, by_table)
        whole = _C.crc32c(data.ctypes.data + cut, data.size - cut, first, by_table)
        assert whole == google_crc32c.value(data.tobytes())


def test_the_check_value_of_the_standard():
    """RFC 3720, B.4: 32 bytes of zeros, and the usual "123456789"."""
    zeros, digits = np.zeros(32, np.uint8), np.frombuffer(b"123456789", np.uint8)
    assert _C.crc32c(zeros.ctypes.data, 32) == 0x8A9136AA
    assert _C.crc32c(digits.ctypes.data, 9) == 0xE3069283

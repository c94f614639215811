"""Pages are made present by several threads, and what is in them stays."""

import ctypes
import mmap
import pathlib

import pytest

from offload.tiers.pages import PIECE_NBYTES, make_present

NBYTES = 2 * PIECE_NBYTES + 3 * mmap.PAGESIZE


def resident_nbytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


@pytest.fixture
def memory():
    """Private, as an arena's; its address and the mapping."""
    mapped = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = ctypes.c_char.from_buffer(mapped)
    yield ctypes.addressof(first), mapped
    del first
    mapped.close()


def test_pages_become_present_to_the_last_and_what_was_written_stays(memory):
    address, mapped = memory
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(address), mmap.PAGESIZE, 23) != 0:
        pytest.skip("this kernel cannot make pages present (Linux 5.14 can)")
    mapped[PIECE_NBYTES + 5] = 7
    before = resident_nbytes()
    make_present(address, NBYTES)
    assert resident_nbytes() - before > 0.9 * NBYTES
    assert mapped[PIECE_NBYTES + 5] == 7
    assert mapped.find(b"\7", PIECE_NBYTES + 6) == -1


def test_a_small_range_is_left_to_who_locks_it(memory):
    before = resident_nbytes()
    make_present(memory[0], PIECE_NBYTES)
    assert resident_nbytes() - before < 0.1 * PIECE_NBYTES


def test_where_nothing_is_mapped_nothing_is_done():
    make_present(1 << 46, NBYTES)

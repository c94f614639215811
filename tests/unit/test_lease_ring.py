"""Staging is lent round and round: no byte to two borrowers, none before its last borrower's work has ended."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.tiers.host import LeaseRing
from offload.types import PAGE_NBYTES


def ring(n_pages: int) -> LeaseRing:
    return LeaseRing(torch.zeros(n_pages * PAGE_NBYTES, dtype=torch.uint8))


def place(lease) -> range:
    first = lease.bytes_tensor.storage_offset()
    return range(first, first + lease.bytes_tensor.numel())


@given(
    st.integers(2, 9), st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.integers(0, 9)), max_size=60)
)
def test_no_byte_is_lent_twice_and_every_last_borrower_has_been_waited_for(n_pages, asked) -> None:
    """Each borrower asks for some pages, then gives one of those lent back: at once, or with work still running."""
    staging = ring(n_pages)
    lent: list = []
    running: dict[int, range] = {}
    for number, (pages, leaves_work, which) in enumerate(asked):
        nbytes = pages * PAGE_NBYTES - 1
        if not staging.has_room(nbytes):
            with pytest.raises(BudgetError, match="lent to others"):
                staging.lease(nbytes)
        else:
            lease = staging.lease(nbytes)
            mine = set(place(lease))
            assert len(mine) >= nbytes
            assert place(lease).start % PAGE_NBYTES == 0
            assert all(mine.isdisjoint(place(other)) for other in lent)
            assert all(mine.isdisjoint(bytes_) for bytes_ in running.values())
            lent.append(lease)
        if lent:
            back = lent.pop(which % len(lent))
            if leaves_work:
                running[number] = place(back)
            back.release_after(lambda n=number: running.pop(n, None))


def test_half_of_the_region_is_always_to_be_had_when_all_has_been_given_back() -> None:
    staging = ring(7)
    for pages in (3, 1, 2, 3, 3, 1, 3, 2, 3):
        assert pages * PAGE_NBYTES <= staging.piece_nbytes_max
        staging.lease(pages * PAGE_NBYTES).release_after(lambda: None)


def test_many_small_pieces_are_lent_at_once() -> None:
    staging = ring(8)
    leases = [staging.lease(PAGE_NBYTES) for _ in range(8)]
    assert len({place(lease).start for lease in leases}) == 8
    assert not staging.has_room(1)

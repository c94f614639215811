"""Host memory of activations that wait: one region, page-locked in few pieces, to the last page of the budget."""

import itertools

import pytest
import torch

import offload
from offload.stores import activations
from offload.stores.activations import ActivationStore
from offload.telemetry import SpanLog, Stalls
from offload.tiers.emulated_device import EmulatedDevice
from offload.tiers.host import HostArena, Spare
from offload.transfer.copies import Copies
from offload.types import PAGE_NBYTES

PIECE_NBYTES = 8 * PAGE_NBYTES


class Locking(EmulatedDevice):
    """Notes what is page-locked: (first byte, byte after the last)."""

    def __init__(self, refuses=False):
        super().__init__()
        self.locked, self.refuses = [], refuses

    def page_lock(self, address, nbytes, pin):
        if self.refuses:
            raise offload.BudgetError("page-locking failed")
        self.locked.append((address, address + nbytes))
        return True


@pytest.fixture
def make(monkeypatch):
    """Makes a store with `pages` of host memory: (device, store)."""
    monkeypatch.setattr(activations, "_LOCKED_NBYTES", PIECE_NBYTES)
    made = []

    def make(pages):
        device = Locking()
        copies = Copies(device, SpanLog())
        made.extend((copies, device))
        return device, ActivationStore(
            device, copies, None, Stalls(), SpanLog(), tier="host", device_nbytes=0,
            spare_host=Spare(pages * PAGE_NBYTES + 100), staging=torch.empty(0, dtype=torch.uint8),
        )  # fmt: skip

    yield make
    for each in made:
        each.close()


def of_pages(n, seed=0):
    return torch.randn(n * PAGE_NBYTES // 4, generator=torch.Generator().manual_seed(seed))


def test_hundreds_of_planes_are_one_mapping_and_a_registration_for_many_of_them(make, monkeypatch):
    made, init = [], HostArena.__init__
    monkeypatch.setattr(HostArena, "__init__", lambda self, n: (made.append(n), init(self, n))[1])
    device, store = make(400)
    tensors = [of_pages(1 + n % 3, n) for n in range(150)]
    held = [store.swap_out(tensor.clone()) for tensor in tensors]
    assert made == [400 * PAGE_NBYTES]
    assert len(device.locked) == -(-sum(t.numel() * 4 for t in tensors) // PIECE_NBYTES)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(device.locked))
    first, last = device.locked[0][0], device.locked[-1][1]
    planes = sorted((h.held.plane.data_ptr(), h.held.nbytes) for h in held)
    assert all(first <= start and start + nbytes <= last for start, nbytes in planes)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(planes))
    for activation, tensor in zip(reversed(held), reversed(tensors), strict=True):
        assert torch.equal(store.swap_in([activation])[0], tensor)


@pytest.mark.parametrize("pages", [7, 8, 9, 23])
def test_planes_take_the_budget_to_its_last_page_and_nothing_beyond_it_is_locked(make, pages):
    device, store = make(pages)
    sizes = itertools.cycle([3, 1, 2])
    held, used = [], 0
    while used < pages:
        n = min(next(sizes), pages - used)
        assert store.has_room(n * PAGE_NBYTES, "host")
        held.append(store.swap_out(of_pages(n)))
        used += n
    assert not store.has_room(100, "host")
    with pytest.raises(offload.BudgetError, match="no room is left"):
        store.swap_out(of_pages(4))
    assert sum(stop - start for start, stop in device.locked) == pages * PAGE_NBYTES


def test_a_plane_larger_than_a_piece_is_locked_at_once(make):
    device, store = make(100)
    store.swap_out(of_pages(1))
    store.swap_out(of_pages(50))
    assert [stop - start for start, stop in device.locked] == [PIECE_NBYTES, 43 * PAGE_NBYTES]


def test_planes_are_taken_one_by_one_where_no_addresses_are_given_ahead_of_their_use(make, monkeypatch):
    """As under a limit on address space, or where the system promises no more memory than it has."""
    init = HostArena.__init__

    def limited(self, nbytes):
        if nbytes > 4 * PAGE_NBYTES:
            raise OSError("mmap of an arena failed: lower host_memory")
        init(self, nbytes)

    monkeypatch.setattr(HostArena, "__init__", limited)
    device, store = make(20)
    tensors = [of_pages(4, n) for n in range(5)]
    held = [store.swap_out(tensor.clone()) for tensor in tensors]
    assert not store.has_room(PAGE_NBYTES, "host")
    assert [stop - start for start, stop in device.locked] == [4 * PAGE_NBYTES] * 5
    for activation, tensor in zip(reversed(held), reversed(tensors), strict=True):
        assert torch.equal(store.swap_in([activation])[0], tensor)


def test_a_plane_that_may_not_be_locked_is_not_counted(make):
    device, store = make(8)
    device.refuses = True
    for _ in range(3):
        with pytest.raises(offload.BudgetError, match="page-locking failed"):
            store.swap_out(of_pages(8))
    device.refuses = False
    store.swap_out(of_pages(8))
    assert not store.has_room(100, "host")

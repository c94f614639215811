"""Activations in the order in which backward wants them: what comes back ahead, and what becomes of dropped ones."""

import gc

import pytest
import torch

from offload.stores.activations import ActivationStore
from offload.telemetry import SpanLog, Stalls
from offload.tiers.emulated_device import EmulatedDevice
from offload.tiers.host import Spare
from offload.transfer.copies import Copies
from offload.types import PAGE_NBYTES

N = 100


class Starting(EmulatedDevice):
    """Calls `then` where a copy to the device starts."""

    def then(self):
        pass

    def copy_in(self, target, source, after=()):
        self.then()
        return super().copy_in(target, source, after)


@pytest.fixture
def device():
    made = Starting()
    yield made
    made.close()


@pytest.fixture
def store(device):
    copies = Copies(device, SpanLog())
    yield ActivationStore(
        device, copies, None, Stalls(), SpanLog(), tier="host", device_nbytes=PAGE_NBYTES,
        spare_host=Spare(N * PAGE_NBYTES), staging=torch.empty(0, dtype=torch.uint8),
    )  # fmt: skip
    copies.close()


def page(number):
    return torch.full((PAGE_NBYTES // 4,), float(number))


def coming(activations):
    """Numbers of those that are on their way back."""
    return [number for number, each in enumerate(activations) if each and each.held.kept is not None]


@pytest.mark.parametrize("n_first", [1, 20, 45])
def test_as_much_comes_back_ahead_as_was_wanted_at_once_and_the_last_first(store, n_first):
    held = [store.swap_out(page(number)) for number in range(N)]
    tensors = store.swap_in(held[N - n_first :])
    assert [int(t[0]) for t in tensors] == list(range(N - n_first, N))
    assert coming(held) == list(range(N - 2 * n_first, N - n_first))
    store.left_block()
    assert coming(held) == list(range(max(0, N - 3 * n_first), N - n_first))


def test_what_stays_on_the_device_counts_for_nothing_that_comes_back(store):
    held = [store.swap_out(page(0)), store.swap_out(page(1), "device"), store.swap_out(page(2))]
    store.swap_in([held[2]])
    assert coming(held) == [0, 1]


def test_an_activation_that_is_dropped_while_others_come_back_disturbs_none_of_them(store, device):
    held = [store.swap_out(page(number)) for number in range(N)]
    dropped = iter(range(0, N - 60, 3))

    def drop():
        number = next(dropped, None)
        if number is not None:
            held[number] = None

    device.then = drop
    for number in reversed(range(N)):
        if held[number] is not None:
            assert int(store.swap_in([held[number]])[0][0]) == number
    assert not store._order


@pytest.mark.parametrize("in_a_cycle", [False, True])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_dropped_activation_leaves_its_room_to_the_next(store, tier, in_a_cycle):
    store._left["host"].nbytes = PAGE_NBYTES
    for number in range(5):
        kept = store.swap_out_where_room(page(number), tier)
        assert kept is not None
        assert store.swap_out_where_room(page(number), tier) is None
        if in_a_cycle:
            kept = [kept]
            kept.append(kept)
        del kept
        if in_a_cycle:
            gc.collect()


def test_where_there_is_no_room_nothing_is_taken(store):
    held = store.swap_out_where_room(page(1), "device")
    before = dict(store.nbytes_by_tier)
    assert store.swap_out_where_room(page(2), "device") is None
    assert store.nbytes_by_tier == before
    assert torch.equal(store.swap_in([held])[0], page(1))

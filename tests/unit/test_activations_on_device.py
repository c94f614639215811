"""Which block inputs stay in device memory where nobody has planned: as long as backward has room beside them."""

import pytest
import torch

import offload
from offload.stores.activations import BESIDE_AN_INPUT, ActivationStore
from offload.telemetry import SpanLog, Stalls
from offload.tiers.device import SharedDevice
from offload.tiers.emulated_device import EmulatedDevice
from offload.tiers.host import Spare
from offload.transfer.copies import Copies
from tests.conftest import batches, build, two_groups

NBYTES = 1 << 16


def tiers_of(device, n_inputs, *, device_nbytes, host_nbytes, tier=None):
    """Where so many inputs of NBYTES go, one after the other."""
    copies = Copies(device, SpanLog())
    store = ActivationStore(
        device, copies, None, Stalls(), SpanLog(), tier=tier, device_nbytes=device_nbytes,
        spare_host=Spare(host_nbytes), staging=torch.empty(0, dtype=torch.uint8),
    )  # fmt: skip
    held = [store.swap_out(torch.zeros(NBYTES, dtype=torch.uint8)) for _ in range(n_inputs)]
    found = [activation.held.tier for activation in held]
    copies.close()
    device.close()
    return found


def test_an_input_stays_on_the_device_only_beside_what_backward_has_there_of_the_whole_batch():
    room = (3 + BESIDE_AN_INPUT) * NBYTES
    found = tiers_of(EmulatedDevice(), 5, device_nbytes=room, host_nbytes=8 * NBYTES)
    assert found == ["device"] * 3 + ["host"] * 2
    found = tiers_of(EmulatedDevice(), 5, device_nbytes=room - 1, host_nbytes=8 * NBYTES)
    assert found == ["device"] * 2 + ["host"] * 3


def test_an_input_stays_there_all_the_same_where_no_other_memory_has_room_or_the_user_wants_it():
    nbytes = {"device_nbytes": 5 * NBYTES, "host_nbytes": 0}
    assert tiers_of(EmulatedDevice(), 5, **nbytes) == ["device"] * 5
    with pytest.raises(offload.BudgetError):
        tiers_of(EmulatedDevice(), 6, **nbytes)
    found = tiers_of(EmulatedDevice(), 5, device_nbytes=5 * NBYTES, host_nbytes=8 * NBYTES, tier="device")
    assert found == ["device"] * 5


def test_a_processor_which_copies_nothing_holds_inputs_to_the_last_byte():
    found = tiers_of(SharedDevice(), 6, device_nbytes=5 * NBYTES, host_nbytes=8 * NBYTES)
    assert found == ["device"] * 5 + ["host"]


def test_a_first_step_leaves_room_for_its_batch_and_the_plan_after_it_knows(monkeypatch):
    monkeypatch.setattr("offload.runtime.late_plan.STEP_FLOPS_MIN", 0.0)
    rooms = []
    plans = offload.runtime.late_plan.plans_in_room
    monkeypatch.setattr(
        "offload.runtime.late_plan.plans_in_room", lambda *args: (rooms.append(args[3]), plans(*args))[1]
    )
    model = build("llama", torch.bfloat16, layers=6)
    model, optimizer = offload.wrap(
        model, two_groups(model), chunk_elements=4096, device="emulated", device_memory="3MB", host_memory="60MB",
        storage=[], micro_batches=8, step_aside="never",
    )  # fmt: skip
    store = model.offload.activations
    batch = batches(1, batch=32, length=32)[0]
    input_nbytes, left_nbytes = 2 * batch.numel() * 64, store.left_nbytes("device")
    model(input_ids=batch, labels=batch).loss.backward()
    on_device = store.nbytes_by_tier["device"]
    optimizer.step()
    model.offload.close()
    n_with_room = max(0, left_nbytes // input_nbytes - BESIDE_AN_INPUT)
    assert on_device == min(6, n_with_room) * input_nbytes
    assert n_with_room < 6
    (room,) = rooms
    assert room.device_unplanned_nbytes == max(0, left_nbytes - BESIDE_AN_INPUT * input_nbytes)

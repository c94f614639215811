"""Gradients that wait for more of them, without storage to wait on: in host memory that the budget has left."""

from __future__ import annotations

import pytest
import torch

import offload
from offload.tiers.emulated_device import EmulatedDevice
from tests.fault.training import Model


def wrapped(**settings):
    torch.manual_seed(0)
    model = Model(4)
    return offload.wrap(
        model, torch.optim.AdamW(model.parameters()), storage=[], step_aside="never", prefetch_blocks=1,
        **{"device": "emulated", "device_memory": "1MB", "host_memory": "20MB", "chunk_elements": 2048, **settings},
    )  # fmt: skip


def accumulate(model):
    with model.offload.no_sync():
        model(torch.randn(4, 8)).sum().backward()


def spare(model):
    return model.offload._assembly.spare_host.nbytes


def test_what_leaves_the_device_arrives_in_page_locked_memory(monkeypatch):
    """A copy to other memory would wait for the device, and hold up the thread that launches."""
    locked, targets = [], []
    copy_out = EmulatedDevice.copy_out

    def lock(self, address, nbytes, pin):
        locked.append((address, address + nbytes))
        return True

    def copy(self, target, source, after=()):
        targets.append((target.data_ptr(), target.data_ptr() + target.nbytes))
        return copy_out(self, target, source, after)

    monkeypatch.setattr(EmulatedDevice, "page_lock", lock)
    monkeypatch.setattr(EmulatedDevice, "copy_out", copy)
    model, optimizer = wrapped()
    accumulate(model)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    model.offload.close()
    assert len(targets) >= 8
    for start, stop in targets:
        assert any(first <= start and stop <= last for first, last in locked)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_their_memory_is_not_given_to_activations_too(device):
    model, _ = wrapped(device=device)
    spare_nbytes = spare(model)
    accumulate(model)
    grads_nbytes = sum(4 * p.numel() for layer in model.layers for p in layer.parameters())
    left_nbytes = spare(model)
    assert grads_nbytes <= spare_nbytes - left_nbytes < 2 * grads_nbytes
    assert not model.offload.activations.has_room(left_nbytes + 1, "host")
    model.offload.close()

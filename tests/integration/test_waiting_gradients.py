"""Gradients that wait for more of them: on storage, and without it in host memory that the budget has left."""

from __future__ import annotations

import pytest
import torch

import offload
from offload.errors import UsageError
from offload.runtime.host_slots import HostSlots
from offload.tiers.emulated_device import EmulatedDevice
from tests.fault.training import Model, make_run, parameters_of, wrap_small


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


class Stop(Exception):
    """Of a backward."""


def stop(grad):
    raise Stop


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_block_that_is_called_twice_needs_no_second_gradient_buffer(tmp_path, device):
    """Its first gradients are on their way to storage when others come, and the smallest budgets have one buffer."""
    results = []
    for settings in ({"storage": [str(tmp_path)], "device": device}, {}):
        torch.manual_seed(0)
        model = Model(3)
        made = torch.optim.AdamW(model.parameters())
        model, optimizer = wrap_small(model, made, step_aside="never", **settings)
        for _ in range(2):
            x = model.layers[0](model.embed(torch.ones(1, 8)))
            model.head(model.layers[2](model.layers[2](x))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(parameters_of(model))
        model.offload.close()
    got, expected = results
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_step_is_made_again_after_a_backward_that_failed_with_one_gradient_buffer(tmp_path, device):
    model, optimizer = make_run(tmp_path, update="deferred", device=device)
    x = model.layers[1](model.layers[0](model.embed(torch.ones(1, 8))))
    x.register_hook(stop)
    with pytest.raises(Stop):
        model.head(model.layers[2](x)).sum().backward()
    optimizer.zero_grad()
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    model.offload.close()


def empty(model):
    for parameter in model.parameters():
        parameter.grad = None


@pytest.fixture(params=["cpu", "emulated"])
def being_fetched(request, tmp_path, monkeypatch):
    """(model, optimizer, block): gradients wait, and the block that has some of them is being fetched.

    Blocks that run in another order, or now and then, are fetched ahead while their gradients wait."""
    model, optimizer = make_run(tmp_path, layers=5, device=request.param)
    with model.offload.no_sync(), monkeypatch.context() as patch:
        patch.setattr(
            HostSlots, "settle", lambda *_: None
        )  # however fast the drive: no fetch is seen to have ended
        x = model.layers[2](model.layers[4](model.embed(torch.ones(1, 8))))
        model.head(x).sum().backward()
    yield model, optimizer, next(block for block in model.offload.blocks if block.touched and block.tickets)
    model.offload.close()


@pytest.mark.parametrize("forget", [lambda model, made: made.zero_grad(), lambda model, made: empty(model)])
def test_gradients_are_forgotten_whose_block_is_being_fetched(being_fetched, forget):
    model, optimizer, _ = being_fetched
    before = parameters_of(model)
    forget(model, optimizer)
    optimizer.step()
    after = parameters_of(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_gradients_whose_block_is_being_fetched_are_not_forgotten_with_those_of_others(being_fetched):
    model, optimizer, block = being_fetched
    kept = {id(segment.parameter) for buffer in block.layout.buffers for segment in buffer.segments}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.grad = None
    with pytest.raises(UsageError, match="those of other parameters have not"):
        optimizer.step()


def test_a_backward_after_no_sync_updates_blocks_as_it_goes(tmp_path):
    model, optimizer = make_run(tmp_path, update="backward")
    with model.offload.no_sync():
        model(torch.ones(1, 8)).sum().backward()
    assert not any(block.updated_since_step for block in model.offload.blocks)
    model(torch.ones(1, 8)).sum().backward()
    assert all(block.updated_since_step for block in model.offload.blocks)
    optimizer.step()
    model.offload.close()

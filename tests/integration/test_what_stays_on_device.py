"""What lives in device memory beside the slots counts against `device_memory`, each piece of memory once."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import offload
from offload.errors import BudgetError
from offload.model.on_device import move_what_stays, stays_nbytes
from tests.device_memory import allocations
from tests.fault.training import STREAMING, Block, Model
from tests.integration.test_state_dicts import same, take_steps

ELSEWHERE = torch.device("meta")
MASK_NBYTES = 1 << 20


class Masked(Block):
    """Has a mask of its own, or one that all blocks share."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return super().forward(x) + self.mask[:64]


def masked_model(shared, layers=4):
    torch.manual_seed(0)
    model = Model(0)
    mask = torch.randn(MASK_NBYTES // 4)
    model.layers = nn.ModuleList(Masked(mask if shared else mask.clone()) for _ in range(layers))
    return model


def start(model, directory, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {
        "storage": [str(directory)],
        "chunk_elements": 2048,
        "device": "emulated",
        **STREAMING,
        **settings,
    }
    return offload.wrap(model, optimizer, **{"host_memory": "20MB", **settings})


def least_device_nbytes(model, directory):
    with pytest.raises(BudgetError) as refused:
        start(model, directory, device_memory="1KB")
    return int(re.search(r"device_memory='(\d+)'", str(refused.value)).group(1)), str(refused.value)


@pytest.mark.parametrize("shared", [False, True])
def test_buffers_are_in_the_smallest_device_memory_that_would_do_each_once(tmp_path, shared):
    without, _ = least_device_nbytes(Model(4), tmp_path / "plain")
    least, told = least_device_nbytes(masked_model(shared), tmp_path / "masked")
    assert least - without == MASK_NBYTES * (1 if shared else 4)
    assert "for the libraries of the device, buffers and scales of quantized weights" in told


def test_what_is_taken_on_an_emulated_device_and_what_stays_there_fit_the_budget_together(
    tmp_path, monkeypatch
):
    taken = allocations(monkeypatch)
    least, _ = least_device_nbytes(masked_model(False), tmp_path)
    for factor in (1, 1.5, 3):
        taken.clear()
        allowed = int(factor * least)
        model, optimizer = start(masked_model(False), tmp_path, device_memory=str(allowed))
        take_steps(model, optimizer, 2)
        buffers = sum(b.nbytes for b in model.buffers())
        left = allowed - sum(taken) - buffers
        assert buffers == 4 * MASK_NBYTES
        assert left >= 0
        assert not model.offload.activations.has_room(left + 1, "device")
        if factor == 1:
            assert left == 0
        model.offload.close()


def test_a_model_whose_buffers_leave_no_room_is_streamed(tmp_path):
    """Nothing is streamed where all state fits in half of what the buffers leave."""
    streams = []
    for model in (Model(4), masked_model(False)):
        settings = {"step_aside": "auto", "device_memory": str(4 * MASK_NBYTES + 400_000)}
        model, _ = start(model, tmp_path, **settings)
        streams.append(not model.offload.aside)
        model.offload.close()
    assert streams == [False, True]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_model_with_shared_buffers_trains_as_in_memory(tmp_path, device):
    plain, model = masked_model(True), masked_model(True)
    take_steps(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 3)
    model, optimizer = start(model, tmp_path, device=device, device_memory="20MB")
    take_steps(model, optimizer, 3)
    same(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    assert len({layer.mask.data_ptr() for layer in model.layers}) == 1
    model.offload.close()


def two_of(first, second):
    model = nn.ModuleList([nn.Module(), nn.Module()])
    for module, buffer in zip(model, (first, second), strict=True):
        module.register_buffer("held", buffer)
    return model


@pytest.mark.parametrize(
    ("buffers", "nbytes"),
    [
        (lambda t: (t, t), 4000),
        (lambda t: (t, t.view(10, 100)), 4000),
        (lambda t: (t, t.clone()), 8000),
        (lambda t: (t[:10], t[20:30]), 80),
        (lambda t: (t[:1].expand(1000), t[:1].expand(500)), 4000),
        (lambda t: (torch.ones(1).expand(1000), None), 4),
        (lambda t: (t, t.to_sparse()), 8000),
    ],
    ids=["one tensor", "a view", "two", "parts of a large one", "rows of a large one", "one row", "sparse"],
)
def test_memory_that_buffers_share_moves_once_and_stays_shared(buffers, nbytes):
    first, second = buffers(torch.arange(1000.0))
    model = two_of(first, second)
    assert stays_nbytes(model) == nbytes
    before = [b.clone() for b in (first, second) if b is not None]
    move_what_stays(model, ELSEWHERE)
    moved = list(model.buffers())
    assert {b.device.type for b in moved} == {"meta"}
    assert [(b.shape, b.dtype) for b in moved] == [
        (b.shape, b.dtype) for b in (before[:1] if first is second else before)
    ]


def test_moved_buffers_hold_what_they_held():
    """To another dtype's view and back to host memory: `move_what_stays` of a model that is elsewhere."""
    whole = torch.arange(12, dtype=torch.float32)
    model = two_of(whole.view(3, 4).t(), whole)
    with torch.device("cpu"):
        move_what_stays(model, torch.device("cpu", 0))  # another device in name
    first, second = (module.held for module in model)
    assert torch.equal(first, whole.view(3, 4).t())
    assert torch.equal(second, whole)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()

"""A device's fused AdamW is used where it gives the bits of torch's operations, and said to be missing where not."""

import io
import logging
import sys
import types

import pytest
import torch

from offload.cli import doctor
from offload.optim import updater
from offload.optim.updater import Updater, fused_for, fused_or_why_not
from offload.tiers.emulated_device import EmulatedDevice
from offload.transfer.io_engine import Hyper

MODULE = "offload.optim.fused_adamw"


@pytest.fixture
def fused(monkeypatch):
    """Puts a function in place of the kernel."""
    import offload.optim

    def put(update):
        module = types.SimpleNamespace(update=update)
        monkeypatch.setitem(sys.modules, MODULE, module)
        monkeypatch.setattr(offload.optim, "fused_adamw", module, raising=False)

    return put


def right(buffer, plane, records, grads, start, stop, scalars):
    """What torch's operations give; a step of `_same_bits` is told by its scalars."""
    step = 1 if scalars.negative_step_size == pytest.approx(-1e-2 / 0.1) else 3
    hyper = Hyper(lr=1e-2, weight_decay=0.1, decoupled=False, step=step)
    slow = Updater(buffer.n_elements, EmulatedDevice())
    slow.update(buffer, plane, records, grads, [(start, stop - start, hyper)])


def test_a_kernel_of_the_same_bits_is_used(fused):
    fused(right)
    assert fused_or_why_not(EmulatedDevice()) == (right, "")


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_kernel_that_changes_one_bit_is_not(fused, wrong):
    def almost(buffer, plane, records, grads, start, stop, scalars):
        right(buffer, plane, records, grads, start, stop, scalars)
        target = (plane.view(torch.uint8), records, records[-5000:])[wrong]
        target[stop // 2] ^= 1

    fused(almost)
    found, why_not = fused_or_why_not(EmulatedDevice())
    assert found is None
    assert "other bits" in why_not


def test_why_there_is_none_is_in_the_log_and_in_doctor(fused, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="offload")
    monkeypatch.setattr(updater, "fused_or_why_not", lambda device: (None, "No module named 'triton'"))
    assert fused_for(EmulatedDevice()) is None
    assert caplog.text == ""  # its updates never were to be fused
    assert fused_for(types.SimpleNamespace(torch_device=torch.device("cuda"))) is None
    assert "torch's operations: No module named 'triton'" in caplog.text
    found = doctor.examine([])
    for why, said in (
        ("No module named 'triton'", "eight times slower: No module named"),
        (None, "by one kernel"),
    ):
        found["gpus"] = [{"name": "card", "memory_bytes": 8 * 10**9, "unfused_updates": why}]
        out = io.StringIO()
        doctor.show(found, out, as_json=False)
        assert said in out.getvalue()

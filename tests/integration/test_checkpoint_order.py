"""What checkpoints read and write is ordered with updates and loads, and each deleted wait is caught."""

import contextlib
import itertools

import pytest

import offload
from offload.checkpoint.beside import SaveBeside
from offload.runtime import chosen_device
from offload.runtime.scheduler import Scheduler
from tests.conftest import slow_but
from tests.device_order import OrderedDevice
from tests.integration.test_device_order import PLACEMENTS, races

HELD = {"host": PLACEMENTS["host"], "storage": {}, "device": PLACEMENTS["state on the device"]}
"""Where most of the state is."""


@pytest.fixture(autouse=True)
def ordered(monkeypatch):
    monkeypatch.setattr(chosen_device, "EmulatedDevice", OrderedDevice)


def saves(directory, *, wait):
    return lambda model: offload.save(model, str(directory / "checkpoints"), wait=wait)


def goes_back(directory):
    """Save, then resume from it in the model that is there."""

    def visit(model):
        offload.resume(model, offload.save(model, str(directory / "checkpoints")))

    return visit


def reads(model):
    model.state_dict()


def changes(model):
    offload.change(model, lambda name, values: values.mul_(0.5))


VISITS = {
    "a save": lambda directory: saves(directory, wait=True),
    "a save beside training": lambda directory: saves(directory, wait=False),
    "a resume": goes_back,
    "a state dict": lambda directory: reads,
    "a change": lambda directory: changes,
}


FAST = [("host", "a save beside training"), ("host", "a change"), ("storage", "a resume")]


@pytest.mark.parametrize(
    ("held", "visit"), slow_but(FAST, list(itertools.product([*HELD, "every step durable"], VISITS)))
)
def test_what_reads_or_writes_the_state_is_ordered_with_updates_and_loads(tmp_path, held, visit):
    settings = HELD.get(held, {"durability": "step"})
    assert races("ordered", tmp_path / "store", after_step=VISITS[visit](tmp_path), **settings) == []


DISCARDED = {
    "durability": "step", "update": "backward", "max_grad_norm": 1e-9, "evaluates": True, "host_memory": "20MB",
}  # fmt: skip


def test_parameters_of_before_a_discarded_step_come_back_after_what_an_evaluation_loads(tmp_path):
    assert races("ordered", tmp_path / "store", **DISCARDED) == []


def without_flush(patch):
    patch.setattr(Scheduler, "flush", lambda self: None)


def without_wait_for_copied(patch):
    patch.setattr(SaveBeside, "before_update", lambda self, block: None)


def without_wait_for_loads(patch):
    patch.setattr(Scheduler, "wait_loaded", lambda self, block: None)


def without_wait_in_reading(patch):
    @contextlib.contextmanager
    def hurried(self, block):
        self.fetch(block, must=True)
        yield

    patch.setattr(Scheduler, "reading", hurried)


DELETED = {
    "save what is still updated": ("a save", without_flush),
    "update what has not been saved yet": ("a save beside training", without_wait_for_copied),
    "resume into what is still updated": ("a resume", without_flush),
    "read what is still updated": ("a state dict", without_wait_in_reading),
    "change what is still loaded": ("a change", without_wait_for_loads),
    "resume into what is still loaded": ("a resume", without_wait_for_loads),
}


FAST = [("host", "update what has not been saved yet"), ("host", "change what is still loaded")]


@pytest.mark.parametrize(
    ("held", "deleted"), slow_but(FAST, list(itertools.product(["host", "storage"], DELETED)))
)
def test_without_one_wait_of_a_checkpoint_there_is_a_race(tmp_path, held, deleted):
    visit, without = DELETED[deleted]
    assert races("ordered", tmp_path / "store", without, after_step=VISITS[visit](tmp_path), **HELD[held])


def test_without_a_wait_for_loads_a_discarded_step_is_a_race(tmp_path):
    assert races("ordered", tmp_path / "store", without_wait_for_loads, **DISCARDED)

"""What lets updates run behind backward and into the next forward changes no number and moves fewer bytes."""

import itertools

import pytest
import torch

import offload
from offload.planner.hardware import save_hardware
from offload.runtime.gradients import Gradients
from offload.runtime.scheduler import Scheduler
from offload.transfer.copies import Copies
from tests.conftest import batches, build, slow_but, two_groups
from tests.cuda import CUDA
from tests.planning import lohan_machine

N_BLOCKS = 6
ROOMY = {"device_memory": "8MB", "host_memory": "4MB"}
ALL_STATE_ON_STORAGE = {"host_memory": "380KB"}


def trained(tmp_path, update, step_of, dtype=torch.bfloat16, n_steps=5, **settings):
    """Parameters by name. `step_of(model, batch, step)` runs the backwards of a step."""
    model = build("llama", dtype, layers=N_BLOCKS)
    model, optimizer = offload.wrap(
        model, two_groups(model), chunk_elements=4096, storage=[str(tmp_path)], step_aside="never", update=update,
        **{**ROOMY, **settings},
    )  # fmt: skip
    for step, batch in enumerate(batches(n_steps)):
        step_of(model, batch.to(model.offload.device), step)
        optimizer.step()
        optimizer.zero_grad()
    found = {name: p.cpu().clone() for block in model.offload.iter_blocks() for name, p in block}
    counters = model.offload.counters()
    model.offload.close()
    return found, counters


def loss(model, batch):
    return model(input_ids=batch, labels=batch).loss


def once(model, batch, step):
    loss(model, batch).backward()


def accumulating_from_third(model, batch, step):
    if step >= 2:
        with model.offload.no_sync():
            loss(model, batch.flip(0)).backward()
    loss(model, batch).backward()


def two_forwards_from_third(model, batch, step):
    if step >= 2:
        (loss(model, batch.flip(0)) + loss(model, batch.flip(1))).backward()
    else:
        loss(model, batch).backward()


def failing_midway(model, batch, step):
    """The first backward of the second step stops at the first block; a user discards it and goes on."""
    if step == 1:
        handle = model.model.layers[0].mlp.register_full_backward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            loss(model, batch).backward()
        handle.remove()
        return
    loss(model, batch).backward()


def fail(module, grads):
    raise RuntimeError("stopped on purpose")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def updates(monkeypatch):
    """Labels of blocks in the order in which their updates were submitted."""
    made = []
    real = Scheduler._submit_update

    def noted(self, block, **how):
        made.append(block.label)
        real(self, block, **how)

    monkeypatch.setattr(Scheduler, "_submit_update", noted)
    return made


@pytest.mark.parametrize(
    "step_of", slow_but([two_forwards_from_third], [once, accumulating_from_third, two_forwards_from_third])
)
@pytest.mark.parametrize("device", [*slow_but(["emulated"], ["cpu", "emulated"]), CUDA], indirect=True)
def test_gradients_that_come_once_and_then_add_up_give_the_bits_of_fp32_ones(tmp_path, device, step_of):
    fp32, _ = trained(tmp_path, "deferred", step_of, device=device)
    as_they_come, _ = trained(tmp_path, "backward", step_of, device=device)
    assert same(as_they_come, fp32)


def test_held_update_is_submitted_before_the_roots_and_gives_the_same_bits(tmp_path, updates):
    held, _ = trained(tmp_path, "backward", once, **ALL_STATE_ON_STORAGE)
    steps = [
        list(group) for is_root, group in itertools.groupby(updates, lambda x: x == "root") if not is_root
    ]
    assert [block for step in steps for block in step[-1:]].count("4") == 5  # the last block but one
    assert all(step.count("4") == 1 for step in steps if "4" in step)
    updates.clear()
    plain, _ = trained(tmp_path, "deferred", once)
    assert same(held, plain)


def test_without_room_for_its_gradients_no_update_is_held(tmp_path, monkeypatch, updates):
    monkeypatch.setattr(Gradients, "can_hold", lambda self: False)
    trained(tmp_path, "backward", once, n_steps=1, **ALL_STATE_ON_STORAGE)
    assert [block for block in updates if block != "root"] == ["5", "4", "3", "2", "1", "0"]


def test_parameters_that_all_fit_the_device_are_never_read_or_written(tmp_path):
    _, roomy = trained(tmp_path, "backward", once, n_steps=4, **ALL_STATE_ON_STORAGE)
    _, roomier = trained(tmp_path, "backward", once, n_steps=8, **ALL_STATE_ON_STORAGE)
    numel = sum(p.numel() for p in build("llama", layers=N_BLOCKS).parameters())
    padded = 1.15  # whole chunks of 4096 elements
    for key in ("read_bytes", "written_bytes"):
        assert 4 * 10 * numel * 0.9 <= roomier[key] - roomy[key] <= 4 * 10 * numel * padded


def test_gradients_that_come_once_leave_the_device_in_half_the_bytes(tmp_path, monkeypatch):
    sent = []
    real = Copies.d2h

    def noted(self, name, target, source):
        if name.startswith("grad_out") and "root" not in name:
            sent.append(target.nbytes)
        return real(self, name, target, source)

    monkeypatch.setattr(Copies, "d2h", noted)
    trained(tmp_path, "backward", once, device="emulated", n_steps=1)
    halves = sum(sent)
    sent.clear()
    trained(tmp_path, "backward", once, device="emulated", n_steps=1, micro_batches=2)
    assert 2 * halves == sum(sent) > 0


@pytest.fixture
def profile(tmp_path):
    """A machine that computes in DRAM, of rates that do not matter."""
    path = str(tmp_path / "machine.json")
    save_hardware(lohan_machine(1).model_copy(update={"shares_host": True, "launch_overhead_s": 0.0}), path)
    return path


def test_a_planned_run_keeps_parameters_where_there_is_room_and_holds_the_same_update(
    tmp_path, updates, profile
):
    """Placed by budget and planned: the same bits, the same order of updates, and no byte more."""
    plain, counted = trained(tmp_path, "backward", once, plan="none", **ALL_STATE_ON_STORAGE)
    unplanned = list(updates)
    updates.clear()
    planned, also_counted = trained(
        tmp_path, "backward", once, batch=tuple(batches(1)[0].shape), hardware=profile, micro_batches=1,
        **ALL_STATE_ON_STORAGE,
    )  # fmt: skip
    assert same(planned, plain)
    assert updates == unplanned
    for key in counted:
        assert also_counted[key] <= counted[key]


@pytest.mark.parametrize("device", ["cpu", "emulated", CUDA], indirect=True)
def test_training_goes_on_after_a_failed_backward_in_deferred_mode_and_is_refused_or_exact_otherwise(
    tmp_path, device
):
    deferred, _ = trained(tmp_path, "deferred", failing_midway, device=device)
    assert all(torch.isfinite(p.float()).all() for p in deferred.values())
    during, _ = trained(tmp_path, "backward", failing_midway, device=device)
    assert all(torch.isfinite(p.float()).all() for p in during.values())

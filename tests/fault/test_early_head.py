"""Durable steps whose head is updated before the blocks' backward: the same numbers, and nothing left of a bad step."""

from __future__ import annotations

import pytest
import torch

from offload.runtime.scheduler import Scheduler
from tests.fault.test_checkpoint import assert_same_state
from tests.fault.test_durable_steps import assert_same_blocks, poison
from tests.fault.training import Model, parameters_of, steps, wrap_small
from tests.fault.trajectory import Run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

HEAD_WIDTH = 160
"""Of 64 weights each: five chunks, most of them whole."""

PLACEMENTS = {
    "storage": {},
    "host": {"host_memory": 10**8, "device_memory": 10**8},
    "emulated": {"device": "emulated"},
}
CASES = [p if p == "storage" else pytest.param(p, marks=pytest.mark.slow) for p in PLACEMENTS]


@pytest.fixture
def early(monkeypatch):
    """How many elements of the root each early update took."""
    made = []
    real = Scheduler.update_early

    def noted(self, final, chunks, hyper_of):
        made.append(sum(stop - start for ranges in chunks for start, stop in ranges))
        real(self, final, chunks, hyper_of)

    monkeypatch.setattr(Scheduler, "update_early", noted)
    return made


def durable(place, placement):
    run = Run(storage=[str(place)], durability="step", head_width=HEAD_WIDTH, **PLACEMENTS[placement])
    run.model.offload.track(**run.tracked)
    return run


@pytest.mark.parametrize("placement", CASES)
def test_a_head_that_is_updated_early_has_the_bits_of_one_updated_last(tmp_path, early, placement):
    """The run that it is compared with updates everything after backward, and keeps one set of extents."""
    ideal = Run(storage=[str(tmp_path / "ideal")], update="deferred", head_width=HEAD_WIDTH)
    expected = ideal.steps(6)
    assert early == []
    first = durable(tmp_path / "d", placement)
    assert first.steps(3) == expected[:3]
    assert len(early) == 2  # the first backward is there to learn from
    assert min(early) >= 4 * 2048
    first.close()
    second = durable(tmp_path / "d", placement)
    assert second.resume(tmp_path / "d").step == 3
    assert second.steps(3) == expected[3:]
    assert_same_state(second.save(tmp_path / "saved"), ideal.save(tmp_path / "saved-ideal"))
    second.model.offload.close(remove=True)
    ideal.close()


@pytest.mark.parametrize("bad", ["layers.1.linear.bias", "head.weight", "embed.weight"])
@pytest.mark.parametrize("placement", CASES)
def test_a_step_that_is_discarded_takes_the_early_update_back(tmp_path, early, placement, bad):
    run = durable(tmp_path / "d", placement)
    run.steps(3)
    before = run.save(tmp_path / "saved")
    poison(run, bad)  # a gradient that comes before the head is updated, or one that comes after
    made = len(early)
    run.step()
    assert len(early) == made + 1
    assert run.model.offload.last_step["discarded"]
    assert_same_blocks(before, run.save(tmp_path / "saved"))
    assert torch.isfinite(torch.tensor(run.steps(2))).all()
    run.model.offload.close(remove=True)


class Broken(Exception):
    pass


@pytest.mark.parametrize("placement", CASES)
def test_a_backward_that_fails_after_the_early_update_leaves_the_last_committed_step(
    tmp_path, early, placement
):
    run = durable(tmp_path / "d", placement)
    run.steps(3)
    before = run.save(tmp_path / "saved")

    def fail(grad):
        raise Broken

    run.model.inner.layers[0].linear.bias.register_hook(fail)
    made = len(early)
    with pytest.raises(Broken):
        run.step()
    assert len(early) == made + 1
    run.optimizer.zero_grad()
    run.close()
    again = durable(tmp_path / "d", placement)
    assert again.resume(tmp_path / "d").step == 3
    assert_same_state(again.save(tmp_path / "again"), before)
    again.model.offload.close(remove=True)


@pytest.mark.parametrize("placement", CASES)
def test_a_head_that_is_all_of_the_root_that_is_trained_is_updated_early_in_every_step(
    tmp_path, early, placement
):
    """The step's last update of the root has nothing to move then."""
    found = []
    for place, settings in (
        ("d", {"durability": "step", **PLACEMENTS[placement]}),
        ("m", {"update": "deferred"}),
    ):
        torch.manual_seed(0)
        model = Model(3, HEAD_WIDTH)
        model.embed.requires_grad_(False)
        made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = wrap_small(
            model, made, storage=[str(tmp_path / place)], chunk_elements=2048, step_aside="never", **settings
        )
        steps(model, optimizer, 4)
        found.append(parameters_of(model))
        model.offload.close(remove=True)
    assert len(early) == 3
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])

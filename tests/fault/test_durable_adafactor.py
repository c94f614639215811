"""Durability `step` with Adafactor: its statistics are in host memory, and go with the step like what is on storage."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch

import offload
from offload.errors import ConfigError, UsageError
from offload.stores import sides
from offload.stores.record_size import RECORD_NBYTES_FIXED
from offload.tiers.encoding import encode
from offload.update_rules import callback_rule
from tests import child
from tests.fault.training import parameters_of, wrap_small
from tests.fault.trajectory import Data

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]


class Stacked(torch.nn.Module):
    """A block with a vector, a matrix and a stack of matrices, which Adafactor keeps in three ways."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.stack = torch.nn.Parameter(torch.randn(2, 8, 8) / 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x)) @ self.stack[0] @ self.stack[1]


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Stacked() for _ in range(3))
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class AdafactorRun:
    """Steps over data whose position belongs to the step."""

    def __init__(self, place, **settings):
        torch.manual_seed(0)
        model = Tower()
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2, weight_decay=0.1)
        settings = {"chunk_elements": 2048, "chunk_buffers": 2, "storage": [str(place)], **settings}
        self.model, self.optimizer = wrap_small(model, optimizer, **settings)
        self.data = Data()
        if settings.get("durability") == "step":
            self.model.offload.track(data=self.data)

    def steps(self, n):
        """Train; the losses."""
        losses = []
        for _ in range(n):
            loss = self.model(self.data.next()).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def state(self, step_counts=None):
        """Parameters, and a copy of the statistics by parameter's number, as they are or were after so many updates."""
        parameters = parameters_of(self.model)
        held = self.optimizer.statistics(step_counts or self.optimizer.all_steps())["adafactor"]
        return parameters, {
            number: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in of.items()}
            for number, of in held.items()
        }


def assert_same(one, other):
    (mine, my_statistics), (theirs, their_statistics) = one, other
    assert mine.keys() == theirs.keys()
    assert my_statistics.keys() == their_statistics.keys()
    assert len(my_statistics) == len(mine)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    for number, held in my_statistics.items():
        for key, value in held.items():
            other = their_statistics[number][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (
                number,
                key,
            )


@pytest.fixture(scope="module")
def ideal(tmp_path_factory):
    """Losses of 6 steps and the state after them, without any durability."""
    run = AdafactorRun(tmp_path_factory.mktemp("ideal"))
    losses = run.steps(6)
    state = run.state()
    run.model.offload.close()
    return losses, state


PLACES = {
    "backward": {"update": "backward"},
    "gradients on storage": {"update": "deferred"},
    "in host memory": {"host_memory": 10**8, "device_memory": 10**8, "step_aside": "never"},
    "emulated": {"device": "emulated"},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("other_layout", [False, True], ids=["in place", "copied"])
def test_a_run_that_ended_goes_on_with_the_bits_it_would_have_had(tmp_path, ideal, place, other_layout):
    losses, state = ideal
    settings = {"durability": "step", **PLACES[place]}
    first = AdafactorRun(tmp_path / "d", **settings)
    assert first.steps(3) == losses[:3]
    first.model.offload.close()
    if other_layout:
        settings["stripe_nbytes"] = 1 << 16
    second = AdafactorRun(tmp_path / "d", **settings)
    resumed = offload.resume(second.model, str(tmp_path / "d"), state={"data": second.data})
    assert resumed.step == 3
    assert second.steps(3) == losses[3:]
    assert_same(second.state(), state)
    second.model.offload.close(remove=True)


@pytest.mark.parametrize("place", ["backward", "gradients on storage"])
def test_a_step_with_an_infinite_gradient_leaves_no_trace_in_the_statistics(tmp_path, place):
    """The next step, of the same number, is made as if the discarded one had never been tried."""
    run = AdafactorRun(tmp_path, durability="step", **PLACES[place])
    undisturbed = AdafactorRun(tmp_path / "other", durability="step", **PLACES[place])
    for disturbs in (False, True, False, True):
        before = run.state()
        if disturbs:
            handle = run.model.layers[1].stack.register_hook(lambda grad: torch.full_like(grad, math.inf))
            run.steps(1)
            handle.remove()
            assert run.model.offload.last_step["discarded"]
            assert_same(run.state(), before)
            undisturbed.data.next()
        assert run.steps(1) == undisturbed.steps(1)
        assert not run.model.offload.last_step["discarded"]
    assert_same(run.state(), undisturbed.state())
    run.model.offload.close(remove=True)
    undisturbed.model.offload.close(remove=True)


def test_the_statistics_of_the_step_before_can_be_had_while_the_next_is_made(tmp_path):
    """A record is written beside the next step's backward, and has what its own step left."""
    run = AdafactorRun(tmp_path, update="backward")
    run.steps(2)
    counts, (_, before) = run.optimizer.all_steps(), run.state()
    run.steps(1)
    (parameters, then), (_, now) = run.state(counts), run.state()
    assert_same((parameters, then), (parameters, before))
    assert all(not torch.equal(now[number]["column"], before[number]["column"]) for number in before)
    run.steps(1)
    with pytest.raises(UsageError, match="statistics of update 4, not of 2"):
        run.state(counts)
    run.model.offload.close()


KILLED = """
import os, signal, sys
from tests.fault.test_durable_adafactor import AdafactorRun
AdafactorRun(sys.argv[1], durability="step").steps(4)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))])
def test_a_killed_run_goes_on_from_its_last_committed_step(tmp_path, ideal, number):
    """Killed as the fourth step returns, when its record may or may not be on the drives: so more than once."""
    losses, state = ideal
    status, _, err = child.run(KILLED, tmp_path)
    assert status == -signal.SIGKILL, err
    run = AdafactorRun(tmp_path, durability="step")
    step = offload.resume(run.model, str(tmp_path), state={"data": run.data}).step
    assert step in (3, 4)
    assert run.steps(6 - step) == losses[step:]
    assert_same(run.state(), state)
    run.model.offload.close(remove=True)


@pytest.mark.parametrize("shape", [(), (7,), (300,), (5, 9), (64, 64), (3, 8, 16), (2, 3, 4, 5)])
def test_a_record_has_room_for_the_statistics_of_every_shape(shape):
    """Counted for a parameter as it is written: with the statistics torch's own Adafactor would keep."""
    parameter = torch.nn.Parameter(torch.zeros(shape))
    theirs = torch.optim.Adafactor([parameter])
    parameter.grad = torch.ones(shape)
    theirs.step()
    kept = [v for k, v in theirs.state[parameter].items() if k in ("row_var", "col_var", "variance")]
    rule = callback_rule("adafactor", (), whole_gradients=True)
    assert rule.statistics_numel(shape) == sum(v.numel() for v in kept)
    assert offload.update_rules.ADAMW.statistics_numel(shape) == 0
    held = {"step": 10**9, "row": kept[0], "column": kept[-1] if len(kept) > 1 else torch.zeros(1, 0)}
    written = json.dumps(encode({"10000": {**held, "square_sum": 1.2345678901234567e-300}}))
    assert len(written) <= rule.encoded_statistics_nbytes(shape)


def test_statistics_that_no_record_can_hold_are_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sides, "MANIFEST_NBYTES_MAX", RECORD_NBYTES_FIXED)
    with pytest.raises(ConfigError, match="use durability='checkpoint'"):
        AdafactorRun(tmp_path, durability="step", host_memory="1GB", device_memory="1GB")

"""An exception in the user's forward or backward leaves an engine that closes at once and takes its store along."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.fault.training import make_run, steps

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

LAYERS = 4


class UsersError(Exception):
    pass


class Fail(torch.autograd.Function):
    """Passes on; its backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise UsersError("in backward")


def fail_in(module, where):
    """Let the next forward of `module` fail, or every backward."""
    original = module.linear.forward

    def forward(x):
        if where == "forward":
            module.linear.forward = original
            raise UsersError("in forward")
        return Fail.apply(original(x))  # in the recomputation too

    module.linear.forward = forward


def one_step(model, optimizer):
    model(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(
    "settings", [{"update": "backward"}, {"max_grad_norm": 1.0}, {"activations": "storage"}, {"activations": "keep"}],
    ids=lambda s: "-".join(map(str, s.values())),
)  # fmt: skip
def test_the_engine_closes_after_an_exception_in_the_users_code(tmp_path, where, layer, settings):
    model, optimizer = make_run(tmp_path, layers=LAYERS, **settings)
    one_step(model, optimizer)
    fail_in(model.layers[layer], where)
    with pytest.raises(UsersError, match=where):
        one_step(model, optimizer)
    start_s = time.perf_counter()
    model.offload.close()
    assert time.perf_counter() - start_s < 10
    assert os.listdir(tmp_path) == []


def test_an_exception_in_the_loss_leaves_the_run_as_it_was(tmp_path):
    """The step is not made: going on gives the numbers of a run that never tried."""
    expected = steps(*make_run(tmp_path / "a", layers=LAYERS), 2)
    model, optimizer = make_run(tmp_path / "b", layers=LAYERS)
    with pytest.raises(UsersError):
        failing_loss(model)
    optimizer.zero_grad()
    got = steps(model, optimizer, 2)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    model.offload.close()


def failing_loss(model):
    model(torch.ones(4, 8)).square().mean()
    raise UsersError("in the loss")


def test_an_exception_in_forward_leaves_the_run_as_it_was(tmp_path):
    expected = steps(*make_run(tmp_path / "a", layers=LAYERS), 2)
    model, optimizer = make_run(tmp_path / "b", layers=LAYERS)
    fail_in(model.layers[2], "forward")
    with pytest.raises(UsersError):
        one_step(model, optimizer)
    optimizer.zero_grad()
    got = steps(model, optimizer, 2)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    model.offload.close()

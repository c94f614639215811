"""A backward that is not one of each step's graph is refused, or does what torch does; it never trains unasked."""

import contextlib

import pytest
import torch

from offload.errors import UsageError
from tests.integration.test_frozen_parameters import Model, start, step

STREAMED = [{}, {"activations": "keep"}, {"max_grad_norm": 1.0}]


def loss_of(model, x=None):
    return model(torch.ones(4, 8) if x is None else x).square().mean()


def again(model):
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()


def twice_differentiable(model):
    x = torch.ones(4, 8, requires_grad=True)
    torch.autograd.grad(loss_of(model, x), [x], create_graph=True)


def of_inputs_alone(model):
    x = torch.ones(4, 8, requires_grad=True)
    torch.autograd.grad(loss_of(model, x), [x])


def backward_to_inputs_alone(model):
    x = torch.ones(4, 8, requires_grad=True)
    loss_of(model, x).backward(inputs=[x])


@pytest.mark.parametrize("settings", STREAMED, ids=str)
@pytest.mark.parametrize(
    ("backward", "said"),
    [
        (again, r"again through the same graph \(retain_graph=True\)"),
        (twice_differentiable, "create_graph=True"),
        (of_inputs_alone, r"torch\.autograd\.grad"),
        (backward_to_inputs_alone, r"backward\(inputs"),
    ],
)
def test_a_backward_that_a_block_cannot_make_is_refused_and_changes_nothing(
    tmp_path, backward, said, settings
):
    expected, optimizer = start(tmp_path / "a", "none", step_aside="never", **settings)
    step(expected, optimizer)
    model, optimizer = start(tmp_path / "b", "none", step_aside="never", update="deferred", **settings)
    with pytest.raises(UsageError, match=said):
        backward(model)
    optimizer.zero_grad()
    step(model, optimizer)
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.state_dict().items())
    model.offload.close()
    expected.offload.close()


def test_the_gradient_of_an_input_comes_beside_those_of_a_step(tmp_path):
    model, optimizer = start(tmp_path, "none", step_aside="never")
    x = torch.ones(4, 8, requires_grad=True)
    loss_of(model, x).backward()
    optimizer.step()
    assert x.grad.abs().sum() > 0
    model.offload.close()


def test_of_frozen_blocks_torch_may_ask_for_the_gradient_of_an_input_alone(tmp_path):
    model, _ = start(tmp_path, "layers.", step_aside="never")
    of_inputs_alone(model)
    model.offload.close()


def across_a_step(model, optimizer, held):
    """Losses of two forwards, one before a step and one after it."""
    first, second = loss_of(model), loss_of(model, torch.full((4, 8), 0.5))
    with held():
        first.backward()
    optimizer.step()
    optimizer.zero_grad()
    second.backward()


@pytest.mark.parametrize("settings", [*STREAMED, {"update": "deferred"}], ids=str)
def test_a_backward_after_a_step_that_has_updated_its_block_is_refused_as_in_torch(tmp_path, settings):
    plain = Model()
    optimizer = torch.optim.AdamW(plain.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        across_a_step(plain, optimizer, contextlib.nullcontext)
    model, optimizer = start(tmp_path, "none", step_aside="never", **settings)
    step(model, optimizer)
    with pytest.raises(UsageError, match=r"after an optimizer\.step\(\) that has updated its parameters"):
        across_a_step(model, optimizer, model.offload.no_sync)
    optimizer.zero_grad()
    step(model, optimizer)
    model.offload.close()

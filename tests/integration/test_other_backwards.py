"""A backward that is not one of each step's graph is refused, or does what torch does; it never trains unasked."""

import contextlib

import pytest
import torch
from torch import nn

import offload
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
    plain.head.requires_grad_(False)  # whose update torch would tell of first
    optimizer = torch.optim.AdamW(plain.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        across_a_step(plain, optimizer, contextlib.nullcontext)
    model, optimizer = start(tmp_path, "head.", step_aside="never", **settings)
    step(model, optimizer)
    with pytest.raises(UsageError, match=r"after an optimizer\.step\(\) that has updated its parameters"):
        across_a_step(model, optimizer, model.offload.no_sync)
    optimizer.zero_grad()
    step(model, optimizer)
    model.offload.close()


class TwoHeads(nn.Module):
    """All but the heads is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).requires_grad_(False)
        self.policy, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return torch.tanh(self.policy(x)), torch.tanh(self.value(x))


def late_through(model, optimizer, head):
    """The policy is updated between forward and backward of a loss through this head; the input's gradient."""
    x = torch.ones(4, 8, requires_grad=True)
    late = model(x)[head].square().mean()
    model(torch.full((4, 8), 0.5))[0].square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    late.backward()
    optimizer.step()
    optimizer.zero_grad()
    return x.grad


@pytest.mark.parametrize(
    "settings",
    [{"step_aside": "always"}, {"step_aside": "never"}, {"step_aside": "never", "update": "deferred"}],
    ids=str,
)
def test_a_backward_after_a_step_is_refused_as_in_torch_only_through_the_parameters_it_has_updated(
    tmp_path, settings
):
    def start(directory=None):
        model = TwoHeads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        if directory is None:
            return model, optimizer
        budgets = {"device_memory": "50MB", "host_memory": "50MB"}
        return offload.wrap(model, optimizer, storage=[str(directory)], **budgets, **settings)

    plain, optimizer = start()
    expected = late_through(plain, optimizer, 1)
    model, wrapped_optimizer = start(tmp_path)
    assert torch.equal(late_through(model, wrapped_optimizer, 1), expected)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    for one in ((plain, optimizer), (model, wrapped_optimizer)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late_through(*one, 0)
    optimizer.zero_grad()
    wrapped_optimizer.zero_grad()
    got = late_through(model, wrapped_optimizer, 1)
    torch.testing.assert_close(got, late_through(plain, optimizer, 1))
    model.offload.close()


def test_a_backward_after_a_step_that_was_discarded_has_the_gradients_of_its_forward(tmp_path):
    x = torch.full((4, 8), 0.5, requires_grad=True)
    torch.manual_seed(0)
    loss_of(Model(), x).backward()
    expected, x.grad = x.grad, None
    model, optimizer = start(
        tmp_path, "none", step_aside="never", durability="step", update="backward", max_grad_norm=1e-9
    )
    first, second = loss_of(model), loss_of(model, x)
    first.backward()
    optimizer.step()
    assert optimizer.discarded_steps == 1
    optimizer.zero_grad()
    second.backward()
    assert torch.equal(x.grad, expected)
    model.offload.close()

"""Gradients are not in `.grad`: whoever looks there is refused with the remedy, never told that there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import offload
from offload.errors import UsageError
from tests.conftest import batches, build

LR = 2e-3
PLACES = {
    "streamed, updates in backward": {"step_aside": "never", "update": "backward"},
    "streamed, updates that wait": {"step_aside": "never", "max_grad_norm": 1.0},
    "all on the device": {"step_aside": "always"},
}


def start(directory, **settings):
    model = build("llama")
    small = {
        "storage": [str(directory)],
        "device_memory": "8MB",
        "host_memory": "4MB",
        "chunk_elements": 4096,
    }
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=LR), **small, **settings)


def backward(model, number=0):
    batch = batches(number + 1)[number]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.item()


def clip(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_values(model, optimizer):
    nn.utils.clip_grad_value_(model.parameters(), 1.0)


def read_one_in_a_block(model, optimizer):
    _ = model.model.layers[1].mlp.up_proj.weight.grad


def read_one_in_the_root(model, optimizer):
    _ = model.lm_head.weight.grad


def clip_with_accelerate(model, optimizer):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, optimizer)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)


def step_with_a_scaler(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "look",
    [clip, clip_values, read_one_in_a_block, read_one_in_the_root, clip_with_accelerate, step_with_a_scaler],
)
def test_looking_for_a_gradient_is_refused_with_the_remedy(tmp_path, place, look):
    model, optimizer = start(tmp_path, **PLACES[place])
    kinds = [type(parameter) for parameter in model.parameters()]
    backward(model)
    assert [type(parameter) for parameter in model.parameters()] != kinds
    with pytest.raises(UsageError, match=r"max_grad_norm=.*register_hook"):
        look(model, optimizer)
    optimizer.step()
    with pytest.raises(UsageError, match="the engine has taken it"):  # a log after step() would be as wrong
        read_one_in_a_block(model, optimizer)
    optimizer.zero_grad()
    assert {parameter.grad for parameter in model.parameters()} == {None}
    assert [type(parameter) for parameter in model.parameters()] == kinds
    model.offload.close()
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_a_scaler_that_is_disabled_steps_as_without_one(tmp_path):
    model, optimizer = start(tmp_path, **PLACES["streamed, updates in backward"])
    expected = [backward(model)]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    expected.append(backward(model, 1))
    model.offload.close()
    plain = build("llama")
    reference = torch.optim.AdamW(plain.parameters(), lr=LR)
    found = [backward(plain)]
    reference.step()
    reference.zero_grad()
    found.append(backward(plain, 1))
    assert found == pytest.approx(expected, abs=1e-5)


def empty(model):
    for parameter in model.parameters():
        parameter.grad = None


FORGET = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "model": lambda model, optimizer: model.zero_grad(),
    "a module around it": lambda model, optimizer: nn.ModuleList([model]).zero_grad(),
    "every parameter": lambda model, optimizer: empty(model),
}


@pytest.mark.parametrize("forget", FORGET.values(), ids=FORGET)
def test_zero_grad_of_any_kind_forgets_gradients(tmp_path, forget, caplog):
    """A backward that is forgotten leaves the numbers of the steps after it as they would have been."""
    losses = []
    for wasted in (False, True):
        model, optimizer = start(tmp_path, **PLACES["streamed, updates that wait"])
        found = []
        for number in range(3):
            if wasted:
                backward(model, 7)
                forget(model, optimizer)
            found.append(backward(model, number))
            optimizer.step()
            forget(model, optimizer)
        losses.append(found)
        model.offload.close()
    assert losses[0] == losses[1]
    assert "zero_grad" not in caplog.text


@pytest.mark.parametrize("use", ["step", "backward"])
def test_forgetting_some_gradients_that_wait_is_refused_by_name(tmp_path, use):
    """Which of them a norm has been taken of is not known any more."""
    model, optimizer = start(tmp_path, **PLACES["streamed, updates that wait"])
    backward(model)
    model.model.layers[1].mlp.up_proj.weight.grad = None
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight: its \.grad has been set to None"):
        optimizer.step() if use == "step" else backward(model)
    empty(model)
    backward(model)
    optimizer.step()
    model.offload.close()


def test_a_copy_and_a_closed_model_have_gradients_of_their_own(tmp_path):
    model, optimizer = start(tmp_path, **PLACES["all on the device"])
    one = copy.deepcopy(model.lm_head.weight)
    backward(model)
    assert one.grad is None
    one.grad = torch.ones_like(one)
    assert one.grad.sum() == one.numel()
    optimizer.step()
    model.offload.close()
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert "zero_grad" not in vars(model)


def test_a_hook_reads_and_changes_gradients_as_they_come(tmp_path):
    """What the message recommends does in streamed training what it does in torch: here halving one gradient."""
    curves = []
    for streamed in (True, False):
        model, optimizer = (
            start(tmp_path, **PLACES["streamed, updates in backward"]) if streamed else (build("llama"), None)
        )
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=LR)
        norms = []

        def halve(grad, norms=norms):
            norms.append(float(grad.norm()))
            return grad * 0.5

        model.model.layers[2].mlp.up_proj.weight.register_hook(halve)
        losses = []
        for number in range(3):
            losses.append(backward(model, number))
            optimizer.step()
            optimizer.zero_grad()
        curves.append(losses + norms)
        if streamed:
            model.offload.close()
    assert len(curves[0]) == 6
    assert curves[0] == pytest.approx(curves[1], abs=2e-5)


def test_a_gradient_put_there_by_hand_is_refused_at_the_step(tmp_path):
    model, optimizer = start(tmp_path, **PLACES["streamed, updates in backward"])
    weight = model.lm_head.weight
    weight.grad = torch.ones(weight.shape)
    with pytest.raises(UsageError, match="by hand"):
        optimizer.step()
    weight.grad = None
    backward(model)
    optimizer.step()
    model.offload.close()


def test_a_parameter_unfrozen_after_wrap_is_refused_rather_than_left_as_it_is(tmp_path):
    model = build("llama")
    model.model.norm.weight.requires_grad_(False)
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=LR), step_aside="never", storage=[str(tmp_path)],
        device_memory="8MB", host_memory="4MB", chunk_elements=4096,
    )  # fmt: skip
    model.model.norm.weight.requires_grad_(True)
    backward(model)
    with pytest.raises(UsageError, match="unfreeze before"):
        optimizer.step()
    model.offload.close()


@pytest.mark.parametrize("place", PLACES)
def test_a_model_is_moved_to_where_it_is_with_gradients_on_their_way(tmp_path, place):
    """As Lightning does after the last step, without a zero_grad()."""
    losses = []
    for moved in (False, True):
        model, optimizer = start(tmp_path / str(moved), **PLACES[place])
        for number in range(2):
            optimizer.zero_grad()
            losses.append(backward(model, number))
            if moved:
                model.cpu()
            optimizer.step()
            if moved:
                model.cpu()
        with pytest.raises(UsageError, match="its gradient is not in"):
            _ = model.lm_head.weight.grad
        model.offload.close()
    assert losses[:2] == losses[2:]


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.mean()


def compete(make_critic):
    """A generator learns through a critic, whose gradients of that loss are thrown away."""
    torch.manual_seed(0)
    critic, of_critic = make_critic(Critic())
    generator = nn.Linear(4, 8)
    of_generator = torch.optim.SGD(generator.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        made = generator(torch.ones(2, 4))
        (critic(torch.ones(2, 8)) - critic(made.detach())).backward()
        of_critic.step()
        of_critic.zero_grad()
        loss = -critic(made)
        loss.backward()
        of_generator.step()
        of_generator.zero_grad()
        of_critic.zero_grad()
        losses.append(loss.item())
    return losses


def test_what_another_models_loss_leaves_is_forgotten_where_updates_wait(tmp_path):
    def wrapped(**settings):
        def make(critic):
            return offload.wrap(
                critic, torch.optim.AdamW(critic.parameters(), lr=LR), storage=[str(tmp_path)],
                device_memory="8MB", host_memory="50MB", step_aside="never", **settings,
            )  # fmt: skip

        return make

    expected = compete(lambda critic: (critic, torch.optim.AdamW(critic.parameters(), lr=LR)))
    assert compete(wrapped(update="deferred")) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UsageError, match=r"a discriminator\), use update='deferred'"):
        compete(wrapped())

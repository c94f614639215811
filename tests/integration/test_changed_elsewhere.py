"""What a block reads of modules outside of it, and others change: its backward computes with what its forward found."""

import pytest
import torch
from torch import nn

import offload
from tests.integration.leaving_blocks import LR, MEMORY, WIDTH, Base


class Reading(Base):
    """Computes with what the model that it is in has in `state`, a number or a tensor."""

    def forward(self, x):
        return x + torch.tanh(self.mix(x) + self.model[0].state / 8)


class Model(nn.Module):
    """Changes `state` in each forward: a buffer that is replaced, or a number."""

    def __init__(self, block=Reading, state=0):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))
        if isinstance(state, torch.Tensor):
            self.register_buffer("state", state)
        else:
            self.state = state
        for layer in self.layers:
            layer.model = [self]

    def change(self):
        self.state = self.state + 1

    def forward(self, x):
        self.change()
        for layer in self.layers:
            x = layer(x)
        return x


def start(directory, *args, model=Model, **settings):
    torch.manual_seed(0)
    made = model(*args).train()
    optimizer = torch.optim.SGD(made.parameters(), lr=LR)
    if directory is None:
        return made, optimizer
    return offload.wrap(made, optimizer, storage=[str(directory)], **MEMORY, **settings)


def train(model, optimizer, forwards):
    """Losses of steps, each of so many forwards before one backward, and the parameters and the state in the end."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for n_forwards in forwards:
        batches = torch.randn(n_forwards, 12, WIDTH, generator=generator)
        loss = sum(model(batch).square().mean() for batch in batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}, float(model.state)


def check(directory, forwards, *args, model=Model, **settings):
    expected = train(*start(None, *args, model=model), forwards)
    wrapped, optimizer = start(directory, *args, model=model, **settings)
    losses, values, state = train(wrapped, optimizer, forwards)
    wrapped.offload.close()
    assert (losses, state) == (expected[0], expected[2])
    assert values.keys() == expected[1].keys()
    assert all(torch.equal(value, expected[1][name]) for name, value in values.items())


@pytest.mark.parametrize("state", [0, torch.zeros(())], ids=["number", "buffer"])
def test_what_the_model_replaces_in_each_of_two_forwards_has_in_backward_the_value_of_its_own_forward(
    tmp_path, state
):
    check(tmp_path, [2, 2, 2], Reading, state)


class OfItsClass(Model):
    """Changes an attribute of its class, which blocks have beside the model itself."""

    def __init__(self):
        super().__init__()
        del self.state
        OfItsClass.state = 0
        for layer in self.layers:
            del layer.model
            layer.kind, layer.model = OfItsClass, [self]

    def change(self):
        OfItsClass.state += 1


def test_so_has_what_belongs_to_its_class(tmp_path):
    check(tmp_path, [2, 2, 2], model=OfItsClass)

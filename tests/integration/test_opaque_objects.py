"""A tensor whose gradient would end in an object that torch's pytree does not know is refused, not trained around."""

import dataclasses
import logging

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import offload
from offload.errors import UsageError
from offload.model import opaque

WIDTH = 16
LR = 2.0**-4


class State:
    def __init__(self, hidden, note=None):
        self.hidden = hidden
        self.note = note


class Slotted:
    __slots__ = ("hidden",)

    def __init__(self, hidden):
        self.hidden = hidden


@dataclasses.dataclass
class Nested:
    inner: State


class Mapped(dict):
    pass


class Known(State):
    """Registered below."""


pytree.register_pytree_node(
    Known, lambda state: ([state.hidden], state.note), lambda values, note: Known(*values, note)
)

MAKE_AND_READ = {
    "attributes": (State, lambda s: s.hidden),
    "slots": (Slotted, lambda s: s.hidden),
    "dataclass": (lambda x: Nested(State(x)), lambda s: s.inner.hidden),
    "dict": (lambda x: Mapped(hidden=x), lambda s: s["hidden"]),
    "known": (Known, lambda s: s.hidden),
}


class Layer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.kind = kind

    def compute(self, x):
        return x + torch.tanh(self.mix(x))


class Returning(Layer):
    def forward(self, x):
        make, read = MAKE_AND_READ[self.kind]
        return make(self.compute(x if isinstance(x, torch.Tensor) else read(x)))


class Given(Layer):
    """Reads an object that what is outside has made."""

    def forward(self, x, made):
        return self.compute(x) * MAKE_AND_READ[self.kind][1](made)


class Writing(Layer):
    def forward(self, x, made):
        made.hidden = self.compute(x)
        return x * 2


class Appending(Layer):
    def forward(self, x, made):
        made.append(x.square().mean())
        return self.compute(x)


class Telling(Layer):
    """Objects that hold nothing that has a gradient."""

    def forward(self, x, made):
        return self.compute(x), State(torch.tensor([1, 2]), note=made.note), nn.Identity(), made


class Model(nn.Module):
    def __init__(self, layer, kind):
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(layer(kind) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)
        self.kind = kind

    def forward(self, x):
        x = self.first(x)
        layer = type(self.layers[0])
        made = [] if layer is Appending else MAKE_AND_READ[self.kind][0](torch.sigmoid(x))
        if layer in (Telling, Writing):
            made = State(torch.arange(x.shape[0]), note="of the batch")
        for each in self.layers:
            x = each(x) if layer is Returning else each(x, made)
            x = x[0] if layer in (Telling, Counting) else x
        return self.head(x if isinstance(x, torch.Tensor) else MAKE_AND_READ[self.kind][1](x))


def train(layer, kind, directory=None, **settings):
    torch.manual_seed(0)
    model = Model(layer, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if directory is not None:
        settings = {"device_memory": "50MB", "host_memory": "50MB", "step_aside": "never", **settings}
        model, optimizer = offload.wrap(model, optimizer, storage=[str(directory)], **settings)
    try:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(4):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses
    finally:
        if directory is not None:
            model.offload.close()


@pytest.mark.parametrize("activations", ["auto", "keep"])
@pytest.mark.parametrize("kind", ["attributes", "slots", "dataclass", "dict"])
@pytest.mark.parametrize(("layer", "said"), [(Returning, "returns"), (Given, "is given")])
def test_an_object_that_hides_a_gradient_is_refused_by_its_type(tmp_path, layer, said, kind, activations):
    with pytest.raises(UsageError, match=rf"layers\.0 {said} a .*register_pytree_node") as refused:
        train(layer, kind, tmp_path, activations=activations)
    name = {"attributes": "State", "slots": "Slotted", "dataclass": "Nested", "dict": "Mapped"}[kind]
    assert f"test_opaque_objects.{name} " in str(refused.value)


@pytest.mark.parametrize("activations", ["auto", "keep"])
@pytest.mark.parametrize("layer", [Returning, Given])
def test_an_object_that_pytree_is_told_of_has_the_bits_of_plain_torch(tmp_path, layer, activations):
    assert train(layer, "known", tmp_path, activations=activations) == train(layer, "known")


def test_a_result_that_a_block_writes_to_an_object_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"layers\.0 writes to a .*State.*register_pytree_node"):
        train(Writing, "attributes", tmp_path)


def test_a_result_that_a_block_puts_into_a_list_that_it_is_given_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"layers\.0 puts a tensor .* into a list or dictionary"):
        train(Appending, "attributes", tmp_path)


def test_objects_without_gradients_go_through(tmp_path):
    assert train(Telling, "attributes", tmp_path) == train(Telling, "attributes")


def test_micro_batches_refuse_a_tensor_that_they_cannot_cut(tmp_path):
    with pytest.raises(
        UsageError, match=r"State that holds a tensor of shape \(4,\), which cannot be cut there"
    ):
        train(Telling, "attributes", tmp_path, micro_batches=2)


class Leaving(Layer):
    """An auxiliary loss in an attribute, and two things that only look like one."""

    def __init__(self, kind):
        super().__init__(kind)
        self.mix = nn.utils.weight_norm(self.mix)

    def forward(self, x, made):
        x = self.compute(x)
        self.aux = [x.square().mean()]
        self.seen = x.detach()
        return x


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_result_that_is_left_in_an_attribute_is_said_once_to_have_no_gradient(tmp_path, caplog):
    opaque._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="offload"):
        train(Leaving, "known", tmp_path)
    (said,) = (record.message for record in caplog.records if "attribute" in record.message)
    assert said.startswith("Leaving leaves a result of its block's forward in its attribute 'aux'")


class Counting(Layer):
    """A number that is another one for each part of a batch."""

    def forward(self, x, made):
        return self.compute(x), float(x.detach().sum())


def test_a_number_that_differs_between_micro_batches_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"micro-batches: a block returned .* for another"):
        train(Counting, "known", tmp_path, micro_batches=2)
    assert train(Counting, "known", tmp_path) == train(Counting, "known")

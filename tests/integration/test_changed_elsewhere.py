"""What a block reads of modules outside of it, and others change: its backward computes with what its forward found."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import offload
from offload.errors import UsageError
from offload.recompute.forward_state import KEPT_NBYTES
from tests.conftest import slow_but
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


class InPlace(Model):
    """Changes it in place before the blocks, and `late` after them as well."""

    def __init__(self, block=Reading, late=False, state=None):
        super().__init__(block, torch.zeros(()) if state is None else state)
        self.late = late

    def change(self):
        self.state += 1

    def forward(self, x):
        x = super().forward(x)
        if self.late:
            self.state += 1
        return x


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("forwards", [[2, 2, 2], [1, 1, 3, 1]], ids=str)
@pytest.mark.parametrize(
    "settings",
    slow_but(
        [{}],
        [{}, {"device": "emulated"}, {"saved_activations": "host"}, {"max_grad_norm": 1e9}],
    ),
    ids=str,
)
def test_a_buffer_of_the_model_that_each_forward_changes_in_place_has_in_backward_the_value_of_its_own_forward(
    tmp_path, settings, forwards, late
):
    check(tmp_path, forwards, Reading, late, model=InPlace, **settings)


def test_micro_batches_of_two_forwards_read_what_their_forward_found(tmp_path):
    """In torch every micro-batch is a forward of its own, which must not count again: here it counts by hand."""

    class ByHand(InPlace):
        def change(self):
            pass

    model, _ = start(None, model=ByHand)
    batches = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    loss = 0
    for batch in batches:
        model.state += 1
        loss = loss + sum(model(part).square().sum() for part in batch.split(6))
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}

    model, optimizer = start(tmp_path, model=InPlace, micro_batches=2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    sum(model(batch).square().sum() for batch in batches).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        if name != "state":
            torch.testing.assert_close((before[name] - value) / LR, expected[name], rtol=1e-4, atol=1e-4)
    model.offload.close()


class Saving(Base):
    """Has autograd save it, so that plain torch refuses that it is changed in place."""

    def forward(self, x):
        return x + torch.tanh(self.mix(x)) * self.model[0].state / 8


def test_where_plain_torch_refuses_the_change_gradients_are_those_of_a_replaced_buffer(tmp_path):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(*start(None, Saving, model=InPlace), [2, 2, 2])
    expected = train(*start(None, Saving, torch.zeros(())), [2, 2, 2])
    model, optimizer = start(tmp_path, Saving, model=InPlace)
    assert train(model, optimizer, [2, 2, 2])[0] == expected[0]
    model.offload.close()


class Pair(NamedTuple):
    number: int
    value: torch.Tensor


class InATuple(InPlace):
    """Blocks find it in a tuple in a list."""

    def __init__(self):
        super().__init__(ReadingATuple)
        for layer in self.layers:
            layer.pairs = [(Pair(0, self.state),)]


class ReadingATuple(Base):
    def forward(self, x):
        return x + torch.tanh(self.mix(x) + self.pairs[0][0].value / 8)


def test_wherever_blocks_have_it(tmp_path):
    check(tmp_path, [2, 1, 2], model=InATuple)


class Shared(InPlace):
    """A buffer of each block too."""

    def __init__(self):
        super().__init__(ReadingItsOwn)
        for layer in self.layers:
            layer.register_buffer("state", self.state)


class ReadingItsOwn(Base):
    def forward(self, x):
        return x + torch.tanh(self.mix(x) + self.state / 8)


def test_a_buffer_of_a_block_that_the_model_changes_is_no_other(tmp_path):
    check(tmp_path, [2, 1, 2], model=Shared)


class Unversioned(InPlace):
    """What lies beside a tensor that is changed in place is changed where no version tells."""

    def __init__(self):
        super().__init__(ReadingBeside)
        self.register_buffer("beside", torch.zeros(()))

    def change(self):
        super().change()
        self.beside.data.add_(1)


class ReadingBeside(Base):
    def forward(self, x):
        return x + torch.tanh(self.mix(x) + self.model[0].beside / 8)


def test_a_change_without_a_version_counts_beside_one_that_has_one(tmp_path):
    check(tmp_path, [1, 1, 3, 1], model=Unversioned)


def test_a_tensor_too_large_to_keep_is_refused_by_its_name(tmp_path):
    model, optimizer = start(tmp_path, Unread, False, torch.zeros(KEPT_NBYTES // 4 + 1), model=InPlace)
    with pytest.raises(UsageError, match="state was changed in place between forward and backward"):
        train(model, optimizer, [2])
    model.offload.close()


class Unread(Base):
    def forward(self, x):
        return x + torch.tanh(self.mix(x))


class WritingInBackward(Base):
    """A hook of backward adds to the tensor that forward has found."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        h, total = self.mix(x), self.total

        def add(grad):
            total.add_(grad.sum())

        if h.requires_grad:
            h.register_hook(add)
        return x + torch.tanh(h)


def test_what_hooks_of_backward_write_counts_or_is_refused(tmp_path):
    """Where two forwards wait for backward, the second run of the first finds a copy."""
    check(tmp_path / "one", [1, 1, 1], WritingInBackward)
    model, optimizer = start(tmp_path / "two", WritingInBackward)
    with pytest.raises(UsageError, match="total was changed in place between forward and backward"):
        train(model, optimizer, [2])
    model.offload.close()

"""What a block leaves behind unregistered is what its first run leaves, though backward runs the block again."""

import contextlib
import random

import pytest
import torch
from torch import nn

import offload
from offload.errors import UsageError
from tests.conftest import slow_but
from tests.integration.leaving_blocks import (
    BLOCKS,
    LR,
    MEMORY,
    WIDTH,
    Base,
    Containers,
    Counted,
    Global,
    Long,
    OfTheClass,
    Outside,
    OutsideUnseen,
    Statistics,
    backward_of,
    same,
    start,
    train,
)


@pytest.mark.parametrize("tier", slow_but(["recompute"], ["recompute", "device"]))
@pytest.mark.parametrize("block", BLOCKS)
def test_what_forward_changes_has_the_values_of_plain_torch_and_so_have_the_losses(tmp_path, block, tier):
    model, optimizer = start(block)
    expected = train(model, optimizer), model.left()
    model, optimizer = start(block, tmp_path, saved_activations=tier)
    got = train(model, optimizer), model.left()
    model.offload.close()
    assert got[0] == expected[0]
    assert same(got[1], expected[1])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("calls", "micro_batches"), slow_but([(2, 1)], [(2, 1), (1, 2)]))
def test_every_call_and_every_micro_batch_leaves_its_own_once(tmp_path, block, calls, micro_batches):
    """As in plain torch, run over the same micro-batches block by block: here each block sees both parts first."""
    model, _ = start(block, calls=calls)
    if block in (OfTheClass, Global, Outside, OutsideUnseen) and micro_batches > 1:
        pytest.skip("blocks share it, and plain torch runs all of them for one part first")
    backward_of(model, micro_batches)
    expected = model.left()
    model, _ = start(block, tmp_path, calls, micro_batches=micro_batches)
    backward_of(model)
    got = model.left()
    model.offload.close()
    assert same(got, expected)


@pytest.mark.parametrize("block", [Counted, Statistics, Containers])
def test_a_kept_graph_leaves_the_same(tmp_path, block):
    model, optimizer = start(block)
    expected = train(model, optimizer), model.left()
    model, optimizer = start(block, tmp_path, activations="keep")
    got = train(model, optimizer), model.left()
    model.offload.close()
    assert got[0] == expected[0]
    assert same(got[1], expected[1])


@pytest.mark.parametrize(
    "settings", slow_but([{}], [{}, {"device": "emulated"}, {"max_grad_norm": 1e9}]), ids=str
)
@pytest.mark.parametrize("together", [True, False])
def test_two_forwards_of_one_step_leave_theirs_in_turn(tmp_path, together, settings):
    """Before one backward for both, or one after the other in no_sync()."""
    found = []
    for directory in (None, tmp_path):
        model, optimizer = start(Containers, directory, **(settings if directory else {}))
        losses = []
        for _ in range(3):
            first = model(torch.ones(4, 8)).square().mean() / 100
            if not together:
                with model.offload.no_sync() if directory else contextlib.nullcontext():
                    first.backward()
            second = model(torch.ones(4, 8) / 2).square().mean() / 100
            (first + second if together else second).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [first.item(), second.item()]
        found.append([*losses, *model.left()])
    model.offload.close()
    assert same(found[0], found[1])


class Many(Base):
    def __init__(self):
        super().__init__()
        self.things = {i: [i] for i in range(900)}
        self.more = {i: {j: [] for j in range(20)} for i in range(900)}

    def forward(self, x):
        return x + torch.tanh(self.mix(x))


def test_more_than_is_looked_at_is_said_in_the_log(tmp_path, caplog):
    model, _ = start(Many, tmp_path)
    backward_of(model)
    model.offload.close()
    assert any("changed twice a step" in record.message for record in caplog.records)


class Large(Base):
    """Reads and writes a tensor that is too large to be copied every time."""

    def __init__(self):
        super().__init__()
        self.book = torch.zeros(1 + (64 << 20) // 4)

    def forward(self, x):
        self.book[0] += 1
        return x + torch.tanh(self.mix(x)) * self.book[0]


def test_a_large_tensor_that_forward_changes_in_place_is_refused_with_the_remedy(tmp_path):
    model, _ = start(Large, tmp_path)
    with pytest.raises(UsageError, match=r"layers\.0\.book.*register_buffer.*activations='keep'"):
        backward_of(model)
    model.offload.close()


class Popping(Long):
    def forward(self, x):
        self.known.popitem()
        return x + torch.tanh(self.mix(x)) * len(self.known)


def test_items_taken_out_of_a_long_container_are_missed_by_its_name(tmp_path):
    model, _ = start(Popping, tmp_path)
    with pytest.raises(UsageError, match=r"layers\.2\.known.*activations='keep'"):
        backward_of(model)
    model.offload.close()


class Reading(Base):
    """Its result depends on what others set in it."""

    def __init__(self):
        super().__init__()
        self.factor, self.offset = 2.0, torch.ones(WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.mix(x) * self.factor) * self.offset


def change_number(layer):
    layer.factor = 5.0


def replace_tensor(layer):
    layer.offset = torch.zeros(WIDTH)


@pytest.mark.parametrize("change", [change_number, replace_tensor])
def test_an_attribute_set_between_forward_and_backward_does_not_reach_this_backward(tmp_path, change):
    found = []
    for directory in (None, tmp_path):
        model, optimizer = start(Reading, directory)
        losses = []
        for _ in range(2):
            loss = model(torch.ones(4, 8)).square().mean()
            for layer in model.layers:
                change(layer)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        losses.append(model(torch.ones(4, 8)).square().mean().item())
        found.append((losses, [layer.factor for layer in model.layers]))
    model.offload.close()
    assert found[0] == found[1]


def test_what_is_set_back_to_what_forward_found_stays_so_though_the_block_runs_again(tmp_path):
    found = []
    for directory in (None, tmp_path):
        model, optimizer = start(Counted, directory)
        losses = []
        for _ in range(3):
            loss = model(torch.ones(4, 8)).square().mean()
            for layer in model.layers:
                layer.calls = 0
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append((losses, [layer.calls for layer in model.layers]))
    model.offload.close()
    assert found[0] == found[1]


def test_a_tensor_changed_in_place_between_forward_and_backward_is_refused_by_its_name(tmp_path):
    model, optimizer = start(Reading, tmp_path)
    train(model, optimizer, 1)
    loss = model(torch.ones(4, 8)).square().mean()
    model.layers[1].offset.zero_()
    with pytest.raises(
        UsageError, match=r"layers\.1\.offset was changed in place between forward and backward"
    ):
        loss.backward()
    model.offload.close()


class Watching(Base):
    """Hooks of backward keep what they see in attributes: that stays, as it is no change of forward."""

    def __init__(self):
        super().__init__()
        self.norms, self.total, self.of_both = [], torch.zeros(()), torch.zeros(())

    def forward(self, x):
        h = self.mix(x)
        self.of_both += 1
        if h.requires_grad:
            h.register_hook(self.see)
        return x + torch.tanh(h)

    def see(self, grad):
        self.norms.append(grad.norm())
        self.total.add_(grad.norm())
        self.of_both.mul_(0.5)

    def left(self):
        return [*self.norms, self.total, self.of_both]


def test_what_hooks_of_backward_keep_stays(tmp_path):
    model, optimizer = start(Watching)
    expected = train(model, optimizer), model.left()
    model, optimizer = start(Watching, tmp_path)
    got = train(model, optimizer), model.left()
    model.offload.close()
    assert got[0] == expected[0]
    assert same(got[1], expected[1])


def late_hook(model):
    seen = []
    model.layers[1].mix.register_forward_hook(lambda module, args, output: seen.append(output.detach().sum()))
    return seen


def hook_of_all_modules(model):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(output.detach().sum())
        if isinstance(module, nn.Linear)
        else None
    )
    seen.append(handle)
    return seen


@pytest.mark.parametrize("put_hook", [late_hook, hook_of_all_modules])
def test_hooks_that_come_after_some_steps_see_each_forward_once(tmp_path, put_hook):
    found = []
    for directory in (None, tmp_path):
        model, optimizer = start(Counted, directory)
        train(model, optimizer, 2)
        seen = put_hook(model)
        train(model, optimizer, 3)
        if put_hook is hook_of_all_modules:
            seen.pop(0).remove()
        found.append(seen)
    model.offload.close()
    assert same(found[1], found[0])


class Drifting(Base):
    """Depends on something that nothing tells of."""

    def forward(self, x):
        return x + torch.tanh(self.mix(x)) * (2 if torch.is_grad_enabled() else 1)


def test_a_block_that_returns_something_else_when_it_runs_again_is_refused(tmp_path):
    model, _ = start(Drifting, tmp_path)
    with pytest.raises(UsageError, match=r"block layers\.2 has not returned in backward.*activations='keep'"):
        backward_of(model)
    model.offload.close()


def test_a_failed_recomputation_leaves_everything_as_forward_left_it(tmp_path):
    class Failing(Counted):
        def __init__(self):
            super().__init__()
            self.mean = torch.zeros(())

        def forward(self, x):
            x = super().forward(x)
            self.mean += 1
            if torch.is_grad_enabled():
                raise ValueError("in backward")
            return x

    model, _ = start(Failing, tmp_path)
    state = random.getstate()
    with pytest.raises(ValueError, match="in backward"):
        backward_of(model)
    assert [layer.calls for layer in model.layers] == [1, 1, 1]
    assert [layer.mean for layer in model.layers] == [1, 1, 1]
    assert random.getstate() == state
    model.offload.close()


class Clamping(Base):
    def forward(self, x):
        self.mix.weight.data.clamp_(-0.1, 0.1)
        return x + torch.tanh(self.mix(x))


class Renormed(Base):
    """As networks with a constraint on their weights are written."""

    def forward(self, x):
        self.mix.weight.data = torch.renorm(self.mix.weight.data, 2, 0, 0.1)
        return x + torch.tanh(self.mix(x))


class Decaying(Base):
    def forward(self, x):
        with torch.no_grad():
            self.mix.weight.mul_(0.9)
        return x + torch.tanh(self.mix(x))


@pytest.mark.parametrize("activations", ["auto", "keep"])
@pytest.mark.parametrize("block", [Clamping, Renormed, Decaying])
def test_a_forward_that_changes_its_own_parameters_is_refused_with_the_remedy(tmp_path, block, activations):
    model, _ = start(block, tmp_path, activations=activations)
    changes = r"block layers\.0: forward changes its parameter mix\.weight.*parametrize"
    if block is Renormed:
        changes = r"layers\.0\.mix\.weight: its data cannot be set"
    with pytest.raises(UsageError, match=changes):
        backward_of(model)
    model.offload.close()


class CountingInADictionary(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layers = nn.ModuleList(Changing(change) for _ in range(3))

    def forward(self, x):
        notes = {"n": 0, "rows": [1]}
        for layer in self.layers:
            x = layer(x, notes)
        return x * notes["n"]


class Tally:
    def __init__(self):
        self.n = 0


class GivingATally(nn.Module):
    """Gives its blocks an object of which torch's pytree knows nothing, and in which they count."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(CountingInATally() for _ in range(3))

    def forward(self, x, tally):
        for layer in self.layers:
            x = layer(x, tally)
        return x


class CountingInATally(Base):
    def forward(self, x, tally):
        tally.n += 1
        return x + torch.tanh(self.mix(x)) * tally.n


def test_a_number_in_an_object_that_blocks_are_given_is_counted_once(tmp_path):
    found = []
    for directory in (None, tmp_path):
        torch.manual_seed(0)
        model = GivingATally()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        if directory:
            model, optimizer = offload.wrap(model, optimizer, storage=[str(directory)], **MEMORY)
        losses = []
        for _ in range(3):
            tally = Tally()
            loss = model(torch.ones(4, WIDTH), tally).square().mean() / 100
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.item(), tally.n]
        found.append(losses)
    model.offload.close()
    assert found[0] == found[1]


class Changing(Base):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x, notes):
        self.change(notes)
        return x + torch.tanh(self.mix(x)) * len(notes["rows"])


def count(notes):
    notes["n"] += 1


@pytest.mark.parametrize(
    "change", [count, lambda notes: notes["rows"].append(2), lambda notes: notes.pop("n")]
)
def test_a_dictionary_or_list_that_a_block_is_given_and_changes_is_refused(tmp_path, change):
    model = CountingInADictionary(change)
    model, _ = offload.wrap(
        model, torch.optim.SGD(model.parameters(), lr=LR), storage=[str(tmp_path)], **MEMORY
    )
    with pytest.raises(UsageError, match=r"block layers\.0 changes a list or dictionary that it was given"):
        model(torch.ones(4, WIDTH))
    model.offload.close()

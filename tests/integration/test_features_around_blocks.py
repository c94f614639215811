"""torch's own features around and inside of blocks give what plain torch gives, or are refused."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.errors import ConfigError, UsageError
from offload.runtime import optimizer as optimizer_module
from tests.conftest import slow_but
from tests.integration.test_between_passes import LR, MEMORY, Base, Dropping, Model, batch, both, start, train

WIDTH = 16
TIERS = [{}, {"saved_activations": "device"}, {"activations": "keep"}]
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.parametrize("settings", slow_but([{}], TIERS), ids=str),
]


class Checkpointed(Dropping):
    """Recomputes a part of itself, from what it computes before."""

    reentrant = True

    def part(self, x):
        return torch.tanh(self.norm(self.drop(x)) * torch.sigmoid(x))

    def forward(self, x):
        inner = torch.relu(self.mix(x)) * 2
        return x + torch.tanh(checkpoint(self.part, inner, use_reentrant=self.reentrant))


class CheckpointedWithoutReentry(Checkpointed):
    reentrant = False


class CheckpointedClosure(Base):
    """What the part needs is no argument of it."""

    reentrant = True

    def forward(self, x):
        h = torch.tanh(self.mix(x)) * 2
        g = torch.sigmoid(h.detach()) * 3
        return x + torch.tanh(checkpoint(lambda y: torch.tanh(y) * g, h, use_reentrant=self.reentrant))


class CheckpointedClosureWithoutReentry(CheckpointedClosure):
    reentrant = False


class Function(torch.autograd.Function):
    """Keeps a tensor where autograd does not see it."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.y = y
        return x * y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.y, None


class WithFunction(Base):
    def forward(self, x):
        h = self.mix(x)
        return x + torch.tanh(Function.apply(h, torch.sigmoid(h.detach() * 2) * 3))


class WithTensorHook(Base):
    """A hook of backward that needs what forward has computed."""

    def forward(self, x):
        h = self.mix(x)
        scale = torch.sigmoid(h.detach() * 2) * 3
        if h.requires_grad:
            h.register_hook(lambda grad: grad * scale)
        return x + torch.tanh(h)


class WithNodeHook(Base):
    def forward(self, x):
        h = torch.tanh(self.mix(x))
        scale = torch.sigmoid(h.detach() * 2) * 3
        if h.grad_fn is not None:
            h.grad_fn.register_prehook(lambda grads: (grads[0] * scale,))
        return x + h


class OwnSavedTensorsHooks(Base):
    """Packs what is saved into something that nobody sees."""

    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: [t * 1], lambda box: box[0]):
            h = torch.tanh(torch.relu(self.mix(x)) * 2)
        return x + torch.tanh(h)


class SavedOnCpu(Base):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            h = torch.tanh(torch.relu(self.mix(x)) * 2)
        return x + torch.tanh(h)


class LooksAtMemory(Base):
    """Reads its own numbers in Python."""

    def forward(self, x):
        h = torch.relu(self.mix(x))
        top = (h.detach() * 2).max(1).values.tolist()
        return x + torch.tanh(h * max(top))


class TorchFunc(Base):
    def forward(self, x):
        gradient = torch.func.grad(lambda y: torch.tanh(y).pow(2).sum())(x.detach())
        return x + torch.tanh(torch.func.vmap(self.mix)(x)) * gradient


INSIDE = [
    Checkpointed,
    CheckpointedWithoutReentry,
    CheckpointedClosure,
    CheckpointedClosureWithoutReentry,
    WithFunction,
    WithTensorHook,
    WithNodeHook,
    OwnSavedTensorsHooks,
    SavedOnCpu,
    LooksAtMemory,
]


@pytest.mark.parametrize("block", INSIDE)
def test_what_backward_needs_beside_saved_tensors_is_computed_again(tmp_path, block, settings):
    got, expected = both(block, tmp_path, settings=settings)
    assert got == expected


def test_torch_func_inside_of_a_block_gives_the_numbers_of_plain_torch_or_is_refused(tmp_path, settings):
    if "activations" in settings:
        with pytest.raises(
            UsageError, match=r"block layers\.0 uses torch\.func.*leave activations='keep' out"
        ):
            train(*start(TorchFunc, tmp_path, **settings))
        return
    got, expected = both(TorchFunc, tmp_path, settings=settings)
    assert got == expected


class Recurrent(nn.Module):
    """Its kernel gives less without gradients, and adds up in another order."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return x + self.layer(x[None])[0][0]


class StatefulRecurrent(Recurrent):
    """Goes on from where the batch before has left it."""

    def forward(self, x):
        y, state = self.layer(x[None], getattr(self, "state", None))
        self.state = tuple(s.detach() for s in state)
        return x + y[0]


@pytest.mark.parametrize("block", [Recurrent, StatefulRecurrent])
def test_recurrent_blocks_give_the_numbers_of_plain_torch(tmp_path, block, settings):
    got, expected = both(block, tmp_path, settings=settings)
    assert got == pytest.approx(expected, rel=1e-5)


# ---- around ----------------------------------------------------------------------------------------------------------


class Around(Model):
    reentrant = True

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


class AroundWithoutReentry(Around):
    reentrant = False


@pytest.mark.parametrize("model", [Around, AroundWithoutReentry])
def test_a_checkpoint_around_blocks_gives_the_numbers_of_plain_torch_or_is_refused(tmp_path, model, settings):
    expected = train(*start(Base2, model=model))
    wrapped, optimizer = start(Base2, tmp_path, model, **settings)
    try:
        assert train(wrapped, optimizer) == expected
    except UsageError as error:
        assert "checkpoint" in str(error)
    wrapped.offload.close()


class Base2(Dropping):
    """With dropout, without statistics, which plain torch changes twice there."""

    def forward(self, x):
        return x + torch.tanh(self.drop(self.mix(x)))


@pytest.mark.parametrize(
    "around",
    [
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: [t * 1], lambda box: box[0]),
        torch.autograd.detect_anomaly,
    ],
    ids=["save_on_cpu", "saved_tensors_hooks", "detect_anomaly"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_contexts_around_forward_change_nothing(tmp_path, around, settings):
    got, expected = both(Dropping, tmp_path, around=around, settings=settings)
    assert got == expected


class Spoiled(Base):
    def forward(self, x):
        return x + torch.sqrt((self.mix(x) * 0).abs() * 0)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomalies_inside_of_blocks_are_detected(tmp_path, settings):
    model, _ = start(Spoiled, tmp_path, **settings)
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"Backward0.*returned nan"):
        model(batch()).square().mean().backward()
    model.offload.close()


def test_another_thread_than_the_one_that_wrapped_trains(tmp_path, settings):
    expected = train(*start(Dropping))
    model, optimizer = start(Dropping, tmp_path, **settings)
    got = []
    thread = threading.Thread(target=lambda: got.extend(train(model, optimizer)))
    thread.start()
    thread.join()
    model.offload.close()
    assert got == expected


# ---- arguments and results -------------------------------------------------------------------------------------------


class Twice(Model):
    """The same tensor twice."""

    def call(self, layer, x):
        return layer(x, x)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = self.call(layer, x)
        return self.head(x)


class AndAView(Twice):
    def call(self, layer, x):
        return layer(x, x[:, :8].repeat(1, 2).t().contiguous().t())


class ViewOfTheOther(Twice):
    def call(self, layer, x):
        return layer(x, x.view(-1, WIDTH))


class Transposed(Twice):
    def call(self, layer, x):
        return layer(x.t().contiguous().t(), x)


class Sliced(Twice):
    def call(self, layer, x):
        return layer(torch.cat([x, x], 1)[:, ::2], x)


class Expanded(Twice):
    """Its largest argument has one row that it shows often."""

    def call(self, layer, x):
        return layer(x, x.mean(0, keepdim=True).expand(3 * x.shape[0], -1)[: x.shape[0]])


class OfTwo(Base):
    def forward(self, x, y):
        return x + torch.tanh(self.mix(x)) * y


class Strided(Base):
    """Does other things with other strides."""

    def forward(self, x, y):
        factor = 1 + sum(x.stride()) / 100
        return x + torch.tanh(self.mix(x)) * y * factor


@pytest.mark.parametrize("block", [OfTwo, Strided])
@pytest.mark.parametrize("model", [Twice, AndAView, ViewOfTheOther, Transposed, Sliced, Expanded])
def test_aliased_and_strided_arguments_give_the_numbers_of_plain_torch(tmp_path, model, block, settings):
    """But for the order in which the gradients of one tensor that comes twice are added up."""
    got, expected = both(block, tmp_path, model=model, settings=settings)
    assert got == pytest.approx(expected, rel=1e-6)


class GivesItself(Base):
    def forward(self, x):
        return x


class GivesAView(Base):
    def forward(self, x):
        return (x + torch.tanh(self.mix(x))).t(), x.t(), x


class OfViews(Model):
    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            a, b, c = layer(x)
            x = (a + b).t() + c
        return self.head(x)


class Mixed(Model):
    def __init__(self, _):
        super().__init__(Base2)
        for position, block in ((0, GivesItself), (2, GivesItself)):
            self.layers[position].forward = block.forward.__get__(self.layers[position])


def test_a_block_may_return_views_of_its_argument(tmp_path, settings):
    got, expected = both(GivesAView, tmp_path, model=OfViews, settings=settings)
    assert got == pytest.approx(expected, rel=1e-6)


def test_a_block_may_return_its_argument(tmp_path, settings):
    got, expected = both(GivesItself, tmp_path, settings=settings)
    assert got == expected


class ChangesWhatIsGivenBack(Model):
    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
            x += 1
        return self.head(x)


def test_what_a_block_gives_back_as_it_is_may_not_be_changed_in_place(tmp_path, settings):
    """Torch, too, lets nobody change a view that an autograd.Function has given; a kept graph is as without blocks."""
    expected = train(*start(GivesItself, model=ChangesWhatIsGivenBack))
    model, optimizer = start(GivesItself, tmp_path, ChangesWhatIsGivenBack, **settings)
    if "activations" in settings:
        assert train(model, optimizer) == expected
    else:
        with pytest.raises((RuntimeError, UsageError), match=r"view|changed in place"):
            train(model, optimizer)
    model.offload.close()


# ---- hooks and losses ------------------------------------------------------------------------------------------------


def test_hooks_on_blocks_and_inside_run_as_often_as_in_plain_torch_and_change_what_they_do_there(
    tmp_path, settings
):
    def hooked(model):
        seen = []
        for layer in model.layers:
            layer.register_forward_hook(
                lambda m, a, out: seen.append(("block", out.detach().sum())) or out * 2
            )
            layer.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
            layer.register_full_backward_hook(
                lambda m, gi, go: seen.append(("back", go[0].sum())) or (gi[0] * 2,)
            )
            layer.mix.register_forward_hook(
                lambda m, a, out: seen.append(("in", out.detach().sum())) or out * 3
            )
            layer.mix.register_full_backward_hook(lambda m, gi, go: seen.append(("in back", go[0].sum())))
            layer.mix.register_full_backward_pre_hook(lambda m, go: (go[0] * 0.5,))
            layer.mix.weight.register_hook(lambda g: seen.append(("weight", g.sum())) or g * 0.5)
        return seen

    model, optimizer = start(Base2)
    expected = hooked(model), train(model, optimizer)
    model, optimizer = start(Base2, tmp_path, **settings)
    got = hooked(model), train(model, optimizer)
    model.offload.close()
    assert got[1] == expected[1]
    assert [(name, value.item()) for name, value in got[0]] == [
        (name, value.item()) for name, value in expected[0]
    ]


def test_a_second_loss_through_a_graph_that_was_retained_is_refused(tmp_path, settings):
    model, _ = start(Base2, tmp_path, update="deferred", **settings)
    out = model(batch())
    out.square().mean().backward(retain_graph=True)
    with pytest.raises(UsageError, match=r"add the losses up"):
        out.abs().mean().backward()
    model.offload.close()


def test_two_losses_added_up_give_the_numbers_of_plain_torch(tmp_path, settings):
    found = []
    for directory in (None, tmp_path):
        model, optimizer = start(Base2, directory, **(settings if directory else {}))
        losses = []
        for _ in range(3):
            out = model(batch())
            loss = out.square().mean() + out.abs().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    model.offload.close()
    assert found[0] == found[1]


# ---- gradients that are refused --------------------------------------------------------------------------------------


class Sparse(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.first = nn.Embedding(32, WIDTH, sparse=sparse)
        self.layers = nn.ModuleList(Base2() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_embedding_with_sparse_gradients_is_refused_before_training(tmp_path, settings):
    model = Sparse(True)
    with pytest.raises(ConfigError, match=r"first.*sparse=False"):
        offload.wrap(
            model, torch.optim.SGD(model.parameters(), lr=LR), storage=[str(tmp_path)], **MEMORY, **settings
        )
    assert model.first.weight.requires_grad


class SparseByFunction(Sparse):
    def __init__(self):
        super().__init__(False)

    def forward(self, x):
        x = nn.functional.embedding(x, self.first.weight, sparse=True)
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_sparse_gradient_that_nobody_could_foresee_is_refused_with_the_remedy(tmp_path, settings):
    model = SparseByFunction()
    model, _ = offload.wrap(
        model, torch.optim.SGD(model.parameters(), lr=LR), storage=[str(tmp_path)], **MEMORY, **settings
    )
    with pytest.raises(UsageError, match=r"first\.weight is sparse.*sparse=False"):
        model(torch.arange(8)).square().mean().backward()
    model.offload.close()


def test_zero_grad_to_zeros_says_once_what_it_does(tmp_path, settings, caplog):
    optimizer_module._tell_of_zeros.cache_clear()
    found = []
    for directory in (None, tmp_path):
        model, optimizer = start(Base2, directory, **(settings if directory else {}))
        losses = []
        for _ in range(3):
            loss = model(batch()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
        found.append(losses)
    model.offload.close()
    assert found[0] == found[1]
    assert sum("set_to_none=False" in record.message for record in caplog.records) == 1

"""What was frozen, or was not there, when the model was wrapped has no state: it is refused, never left as it is."""

import pytest
import torch
from torch import nn

import offload
from offload.errors import ConfigError, UsageError
from tests.conftest import build

WIDTH = 16
PLACES = {
    "streamed": {"step_aside": "never"},
    "updates that wait": {"step_aside": "never", "max_grad_norm": 1.0},
    "on the device": {"step_aside": "always"},
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.mix(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def start(directory, frozen, *, all_in_groups=False, **settings):
    torch.manual_seed(0)
    model = Model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    parameters = [p for p in model.parameters() if p.requires_grad or all_in_groups]
    settings = {"device_memory": "50MB", "host_memory": "50MB", **settings}
    return offload.wrap(model, torch.optim.AdamW(parameters), storage=[str(directory)], **settings)


def step(model, optimizer):
    model(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("all_in_groups", [False, True])
@pytest.mark.parametrize("frozen", ["first.", "layers.", "layers.1."])
def test_a_parameter_that_is_unfrozen_later_is_refused_by_its_name_at_the_step(
    tmp_path, frozen, all_in_groups, place
):
    model, optimizer = start(tmp_path, frozen, all_in_groups=all_in_groups, **PLACES[place])
    step(model, optimizer)
    unfrozen = next(name for name, _ in model.named_parameters() if name.startswith(frozen))
    model.get_parameter(unfrozen).requires_grad_(True)
    with pytest.raises(UsageError, match=f"{unfrozen} was frozen when offload.wrap was called"):
        step(model, optimizer)
    model.offload.close()


@pytest.mark.parametrize("place", PLACES)
def test_a_group_of_parameters_that_no_step_would_change_is_refused(tmp_path, place):
    model, optimizer = start(tmp_path, "layers.1.", **PLACES[place])
    model.layers[1].requires_grad_(True)
    new = nn.Linear(3, 5)
    for parameters in (model.layers[1].parameters(), new.weight, [("bias", new.bias)]):
        with pytest.raises(UsageError, match=r"frozen when offload\.wrap was called, or is not the model's"):
            optimizer.add_param_group({"params": parameters})
    assert len(optimizer.param_groups) == 1
    model.layers[1].requires_grad_(False)
    step(model, optimizer)
    model.offload.close()


def test_a_group_of_parameters_that_were_trainable_is_added(tmp_path):
    """One was in no group yet: without it, the first step is refused."""
    torch.manual_seed(0)
    expected = Model()
    torch.manual_seed(0)
    model = Model()
    head = list(model.head.parameters())
    rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
    settings = {"device_memory": "50MB", "host_memory": "50MB", "step_aside": "never"}
    model, optimizer = offload.wrap(model, torch.optim.SGD(rest, lr=0.5), storage=[str(tmp_path)], **settings)
    optimizer.add_param_group({"params": head, "lr": 0.25})
    groups = [
        {"params": list(expected.parameters())[:-2]},
        {"params": expected.head.parameters(), "lr": 0.25},
    ]
    plain = torch.optim.SGD(groups, lr=0.5)
    for _ in range(2):
        step(model, optimizer)
        step(expected, plain)
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.state_dict().items())
    model.offload.close()


def test_a_step_after_close_is_told_that_the_engine_is_closed(tmp_path):
    model, optimizer = start(tmp_path, "layers.1.", step_aside="never")
    step(model, optimizer)
    model.offload.close()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(UsageError, match="the offload engine is closed"):
        optimizer.step()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_model_that_is_only_computed_with_needs_no_optimizer(tmp_path, device):
    """A teacher: its results, and the gradient that goes through it, are those of memory."""
    plain, teacher = (build("llama", layers=8).requires_grad_(False).eval() for _ in range(2))
    teacher, optimizer = offload.wrap(
        teacher, None, device=device, device_memory="600KB", host_memory="1300KB", storage=[str(tmp_path)],
        chunk_elements=4096, step_aside="never",
    )  # fmt: skip
    given = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for model in (plain, teacher):
        embeddings = given.clone().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logits.square().mean().backward()
        found.append((logits, embeddings.grad))
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)
    counters = teacher.offload.counters()
    assert counters["read_bytes"] > 0
    assert optimizer.state_dict()["state"] == {}
    teacher.offload.close()


def test_a_directory_is_loaded_frozen(tmp_path):
    build("llama", layers=4).save_pretrained(tmp_path / "model")
    settings = {"device_memory": "600KB", "host_memory": "1300KB", "chunk_elements": 4096}
    teacher, optimizer = offload.load(
        tmp_path / "model", frozen=True, storage=[str(tmp_path / "store")], step_aside="never", **settings
    )
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert optimizer.state_dict()["state"] == {}
    plain = type(teacher).from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(teacher(ids).logits, plain(ids).logits)
    stored_nbytes = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert stored_nbytes < 1.5 * sum(p.numel() * p.element_size() for p in plain.parameters())
    teacher.offload.close()
    with pytest.raises(ConfigError, match="leave out one"):
        offload.load(tmp_path / "model", torch.optim.AdamW, frozen=True)


def test_no_optimizer_for_a_model_that_is_to_be_trained_is_refused_before_anything_moves(tmp_path):
    model = build("llama")
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(
        ConfigError, match=r"self_attn\.q_proj\.weight requires gradients: .*requires_grad_\(False\)"
    ):
        offload.wrap(model, None, storage=[str(tmp_path / "store")])
    assert not (tmp_path / "store").exists()


class Gated(nn.Module):
    """What its gate's gradient needs is the result of an operation that nothing else needs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x, scale):
        return x + (self.linear(x) * self.gate) * (1 + torch.tanh(scale * 2.0))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Gated() for _ in range(3))

    def forward(self, x):
        scale = self.scale(x)
        for layer in self.layers:
            x = layer(x, scale)
        return x


@pytest.mark.parametrize("thawed", ["gate", "scale"])
@pytest.mark.parametrize("saved", ["recompute", "device"])
def test_what_is_trained_again_after_some_steps_has_its_gradients(poison, thawed, saved):
    """Those of a parameter of blocks, and those that blocks give a tensor outside: what is recomputed is what is wanted
    now, and not what was wanted when the block ran first."""
    results = []
    for settings in (None, {"step_aside": "never", "saved_activations": saved, "device_memory": "1GB"}):
        torch.manual_seed(0)
        model = Stack()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        if settings is not None:
            model, optimizer = offload.wrap(model, optimizer, host_memory="1GB", **settings)
        for step in range(6):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(step >= 3 or thawed not in name)
            model(torch.ones(4, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-5, atol=1e-6)
    model.offload.close()


@pytest.mark.parametrize("settings", [{}, {"activations": "keep"}, {"micro_batches": 2}], ids=str)
@pytest.mark.parametrize("in_forward", [False, True], ids=["frozen in forward", "frozen in backward"])
def test_what_is_frozen_in_forward_or_in_backward_alone_gets_no_gradient(tmp_path, in_forward, settings):
    """As in memory: a critic is frozen while the loss of what it judges is made, and trained again before backward."""
    model, optimizer = start(tmp_path, "none", step_aside="never", update="deferred", **settings)
    for _ in range(2):
        step(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    critic = model.layers[1]
    critic.requires_grad_(in_forward)
    loss = model(torch.ones(4, 8)).square().mean()
    critic.requires_grad_(not in_forward)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith("layers.1.")}
    critic.requires_grad_(True)
    step(model, optimizer)
    assert not torch.equal(model.state_dict()["layers.1.mix.weight"], before["layers.1.mix.weight"])
    model.offload.close()

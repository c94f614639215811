"""Transformers and U-Nets of diffusers learn through storage what they learn in memory, and their directories load."""

from __future__ import annotations

import json

import pytest
import torch

import offload
from tests.fault.training import smallest_budgets

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 8, 32), "img_ids": noise(16, 3),
        "pooled_projections": noise(2, 32), "timestep": torch.tensor([0.3, 0.7]), "txt_ids": noise(8, 3),
    }  # fmt: skip


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 6, 32),
        "pooled_projections": noise(2, 64), "timestep": torch.tensor([300, 700]),
    }  # fmt: skip


def unet():
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    )  # fmt: skip
    return model, {
        "sample": noise(2, 4, 16, 16), "encoder_hidden_states": noise(2, 6, 32), "timestep": torch.tensor([300, 700])
    }  # fmt: skip


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=64, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 2, 8, 8), "encoder_hidden_states": noise(2, 6, 16),
        "timestep": torch.tensor([300, 700]),
    }  # fmt: skip


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 6, 32),
        "timestep": torch.tensor([300, 700]), "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }  # fmt: skip


MODELS = {"Flux": flux, "Stable Diffusion 3": sd3, "U-Net": unet, "Wan": wan, "PixArt": pixart}
N_BLOCKS = {"Flux": 5, "Stable Diffusion 3": 3, "Wan": 3, "PixArt": 3}


def built(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.train(), batch


def adamw(model, lr=1e-3):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def streamed(model, directory, lr=1e-3, **more):
    """In the smallest host memory that would do."""
    settings = {"storage": [str(directory)], "chunk_elements": 2048, "step_aside": "never", **more}
    budgets = smallest_budgets(model, adamw(model), settings)
    budgets["device_memory"] += 2**21  # for inputs that wait
    return offload.wrap(model, adamw(model, lr), **budgets, **settings)


def train(model, optimizer, batch, n_steps=4):
    losses = []
    for _ in range(n_steps):
        loss = model(**batch).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_memory(tmp_path, name, checkpointing):
    """With diffusers' own gradient checkpointing too, which is turned off."""
    plain, batch = built(name)
    expected = train(plain, adamw(plain), batch)
    model, _ = built(name)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model, optimizer = streamed(model, tmp_path)
    assert len(model.offload.blocks) == N_BLOCKS.get(name, len(model.offload.blocks))
    assert train(model, optimizer, batch) == pytest.approx(expected, abs=5e-6)
    assert expected[-1] < expected[0]
    assert model.offload.counters()["read_bytes"] > 0
    model.offload.close()


def injected(name):
    from peft import LoraConfig

    model, batch = built(name)
    model.requires_grad_(False)
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
    return model, batch


def test_adapters_are_learned_and_merged_at_export(tmp_path):
    plain, batch = injected("Flux")
    expected = train(plain, adamw(plain, 1e-2), batch)
    model, _ = injected("Flux")
    model, optimizer = streamed(model, tmp_path, lr=1e-2)
    assert train(model, optimizer, batch) == pytest.approx(expected, abs=5e-6)
    offload.export(model, str(tmp_path / "out"))
    with torch.no_grad():
        sample = model(**batch).sample
    model.offload.close()
    merged = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(**batch).sample.detach(), sample)


@pytest.mark.parametrize("max_shard_nbytes", [2e9, 1e5], ids=["one file", "several"])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_an_export_is_what_diffusers_reads_and_what_offload_loads(tmp_path, name, max_shard_nbytes):
    model, batch = built(name)
    model, optimizer = streamed(model, tmp_path)
    train(model, optimizer, batch)
    expected = model.state_dict()
    files = offload.export(model, str(tmp_path / "out"), max_shard_nbytes=max_shard_nbytes)
    model.offload.close()
    assert (len(files) > 1) == (max_shard_nbytes < 1e6)
    kind = type(built(name)[0])
    reloaded = kind.from_pretrained(tmp_path / "out").state_dict()
    assert reloaded.keys() == expected.keys()
    assert all(torch.equal(reloaded[key], tensor) for key, tensor in expected.items())
    again, _ = offload.load(
        str(tmp_path / "out"),
        storage=[str(tmp_path)],
        device_memory="50MB",
        host_memory="50MB",
        step_aside="never",
    )
    assert type(again) is kind
    got = again.state_dict()
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    again.offload.close()


def test_what_a_class_keeps_in_fp32_is_loaded_in_fp32_as_diffusers_does(tmp_path):
    model, _ = built("Wan")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    expected = type(model).from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in expected.named_parameters()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    loaded, _ = offload.load(
        str(tmp_path / "saved"), storage=[str(tmp_path)], device_memory="50MB", host_memory="50MB"
    )
    assert {name: p.dtype for name, p in loaded.named_parameters()} == dtypes
    loaded.offload.close()


def test_a_class_that_diffusers_does_not_have_is_named(tmp_path):
    built("Flux")[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "NoSuchModel"}))
    with pytest.raises(offload.ConfigError, match="has no model NoSuchModel"):
        offload.load(str(tmp_path), storage=[str(tmp_path)])

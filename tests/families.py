"""One small random model of every architecture family that the documents promise, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

VOCAB = 96
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64}
_OLD = {"vocab_size": VOCAB, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Family:
    """`model` and `config` are class names of transformers; `lora_targets` module names for adapters."""

    model: str
    config: str
    settings: dict[str, Any]
    lora_targets: tuple[str, ...]
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]]
    n_blocks: int = 3
    stacks: str = "one stack"
    shares_activations: bool = False
    """Blocks read one tensor besides the one they hand on: streamed, its gradients are added in another order."""

    def build(self, seed: int = 0) -> Any:
        """The fp32 model, in training mode, with the weights of `seed`."""
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.settings)
        return getattr(transformers, self.model)(config).train()


def _causal(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (4, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0  # one padded sequence
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _sequence_to_sequence(generator: torch.Generator) -> dict[str, torch.Tensor]:
    labels = torch.randint(2, VOCAB, (4, 7), generator=generator)
    source = torch.randint(2, VOCAB, (4, 12), generator=generator)
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels}


def _images(generator: torch.Generator) -> dict[str, torch.Tensor]:
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 5, (4,), generator=generator)}


_NO_DROPOUT = {"attention_dropout": 0.0}
_LLAMA_TARGETS = ("q_proj", "v_proj")
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}

FAMILIES: dict[str, Family] = {
    "Llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED, _LLAMA_TARGETS, _causal),
    "Mistral": Family(
        "MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 8}, _LLAMA_TARGETS, _causal
    ),
    "Qwen2": Family(
        "Qwen2ForCausalLM", "Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}, _LLAMA_TARGETS, _causal
    ),
    "Qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}, _LLAMA_TARGETS, _causal),
    "Gemma": Family("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 8}, _LLAMA_TARGETS, _causal),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        },
        _LLAMA_TARGETS,
        _causal,
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ("c_attn",),
        _causal,
    ),
    "GPT-NeoX": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SIZES, **_OLD}, ("query_key_value",), _causal
    ),
    "OPT": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "dropout": 0.0}
        | {"word_embed_proj_dim": 32, **_OLD},
        _LLAMA_TARGETS,
        _causal,
    ),
    "Phi": Family("PhiForCausalLM", "PhiConfig", {**_SIZES, **_OLD}, _LLAMA_TARGETS, _causal),
    "BERT": Family(
        "BertForMaskedLM",
        "BertConfig",
        {**_SIZES, **_OLD, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        ("query", "value"),
        _causal,
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
        | {"vocab_size": VOCAB, "dropout_rate": 0.0, "decoder_start_token_id": 0},
        ("q", "v"),
        _sequence_to_sequence,
        n_blocks=5,
        stacks="encoder and decoder",
        shares_activations=True,
    ),
    "Jamba": Family(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_GROUPED,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
        }
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
        ("q_proj", "v_proj", "in_proj"),
        _causal,
        stacks="two classes",
    ),
    "ViT": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {**_SIZES, "image_size": 16, "patch_size": 4, "num_labels": 5}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        ("q_proj", "v_proj"),
        _images,
    ),
    "Mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
        _LLAMA_TARGETS,
        _causal,
    ),
    "Qwen3-MoE": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_GROUPED, "head_dim": 8, "moe_intermediate_size": 32, **_MOE},
        _LLAMA_TARGETS,
        _causal,
    ),
}

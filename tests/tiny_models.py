"""Any class of transformers that has a loss over tokens, made small by writing small numbers into its configuration."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 120
NUMEL_MAX = 4_000_000
SIZES = {
    64: (
        "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size emb_dim projection_dim "
        "out_hidden_size hidden_dim"
    ),
    96: (
        "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim dense_intermediate_size"
    ),
    48: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    4: (
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth "
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts index_topk patch_size"
    ),
    2: (
        "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk linear_num_key_heads linear_num_value_heads "
        "index_n_heads attn_layer_period temporal_patch_size"
    ),
    16: (
        "head_dim q_lora_rank kv_lora_rank v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim "
        "index_head_dim mamba_d_head image_size"
    ),
    8: "qk_rope_head_dim rotary_dim sliding_window state_size mamba_n_heads mamba_d_state",
    1: (
        "n_group topk_group first_k_dense_replace attn_layer_offset expert_layer_offset num_nextn_predict_layers"
    ),
    VOCAB: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions seq_length max_seq_len",
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
LEAST = (
    "hidden_size", "d_model", "n_embd", "dim", "intermediate_size", "num_hidden_layers", "n_layer", "n_layers",
    "num_layers", "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
WITHOUT = ((), ("head_dim",), ("head_dim", "num_key_value_heads"))
"""What is left as it is, attempt by attempt: some classes derive it from the rest."""


def _small(kind: Any, without: tuple[str, ...], only: tuple[str, ...] | None) -> dict[str, Any]:
    """Arguments of a configuration's class that make it small, those of configurations inside of it too."""
    whole = kind()
    numbers = {name: size for size, names in SIZES.items() for name in names.split()} | TOKENS
    told: dict[str, Any] = {}
    for name, number in numbers.items():
        present = getattr(whole, name, None)
        is_number = isinstance(present, int) and not isinstance(present, bool)
        if name in TOKENS or (is_number and name not in without and (only is None or name in only)):
            told[name] = number
    rope = getattr(whole, "rope_parameters", None)
    if isinstance(rope, dict) and without:
        told["rope_parameters"] = {
            **rope,
            "mrope_section": [2, 3, 3],
        }  # of half a head; some have three positions
    for name in getattr(kind, "sub_configs", None) or {}:
        if getattr(whole, name, None) is not None:
            told[name] = _small(type(getattr(whole, name)), without, only)
    return told


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB - 20, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def tiny(name: str) -> Any:
    """The fp32 model of a class, in training mode, without dropout. Raises ValueError, saying why, where no attempt
    gives one that computes a loss."""
    import transformers

    kind = getattr(transformers, name)
    errors: list[str] = []
    for only in (None, LEAST):
        for without in WITHOUT:
            try:
                settings = _small(kind.config_class, without, only)
                config = kind.config_class(**settings)
                with torch.device("meta"):
                    numel = sum(p.numel() for p in kind(config).parameters())
                if numel > NUMEL_MAX:
                    raise ValueError(f"{numel} parameters")
                torch.manual_seed(0)
                model = kind(kind.config_class(**settings)).float().train()
                for module in model.modules():
                    if isinstance(module, torch.nn.Dropout):
                        module.p = 0.0
                loss = model(**batch()).loss
                loss.backward()
                if not torch.isfinite(loss):
                    raise ValueError("its loss is not finite")
                model.zero_grad()
                return model
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:160])
    raise ValueError(errors[0])

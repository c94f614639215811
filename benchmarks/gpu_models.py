"""What gpu_train.py trains: the plain Llama-shaped decoder, or Llama 3.2 as `transformers` has it."""

from __future__ import annotations

from typing import Any, Protocol

import gpu_common
import torch
from llama_shaped import SHAPES, LlamaShaped, Shape
from torch import nn

LOSS_ROWS = 2048


class Family(Protocol):
    """One architecture of one size; `shape` is its sizes."""

    shape: Shape
    name: str
    recomputes_loss: bool
    """The model runs its head and its loss again in backward, whether layers are recomputed or not."""
    chunked_loss: bool
    """Of `offload.wrap`."""

    def empty(self) -> nn.Module:
        """On the meta device, in bf16."""
        ...

    def make(self, *, recompute: bool) -> nn.Module:
        """In host memory, in bf16, with random weights; `recompute`: layers run again in backward."""
        ...

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Its blocks."""
        ...

    def loss(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the next token; `tokens` is (batch, tokens) of int64."""
        ...

    def samples_at_once(self, batch: int, micro_tokens: int, sequence: int) -> int:
        """Of a batch, in one forward of plain torch; the rest is accumulated."""
        ...


class Plain:
    """`LlamaShaped`, whose head and loss take a part of the tokens at once."""

    recomputes_loss = True
    chunked_loss = False

    def __init__(self, model: str, vocab: int | None) -> None:
        self.shape = gpu_common.replaced(SHAPES[model], vocab=vocab or 32000)
        self.name = model

    def empty(self) -> nn.Module:
        """See `Family`."""
        return gpu_common.on_meta(lambda: LlamaShaped(self.shape), torch.bfloat16)

    def make(self, *, recompute: bool) -> nn.Module:
        """See `Family`."""
        return gpu_common.with_random_weights(
            lambda: LlamaShaped(self.shape, recompute=recompute, loss_rows=LOSS_ROWS), torch.bfloat16
        )

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """See `Family`."""
        return model.layers

    def loss(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """See `Family`."""
        return model(tokens)

    def samples_at_once(self, batch: int, micro_tokens: int, sequence: int) -> int:
        """All."""
        return batch


class Transformers:
    """`LlamaForCausalLM` in the shapes of Llama 3.2: grouped queries, tied head, 128,256 tokens.

    This library computes its loss in chunks. Plain torch makes all logits of a forward, as the model's own loss does,
    so that it takes the batch in parts.
    """

    recomputes_loss = False
    chunked_loss = True

    def __init__(self, model: str, vocab: int | None) -> None:
        self.shape = gpu_common.replaced(SHAPES[model], vocab=vocab or 128_256)
        self.name = f"transformers_{model}"

    def _config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.shape.hidden,
            intermediate_size=self.shape.intermediate,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            num_key_value_heads=max(1, self.shape.heads // 4),
            head_dim=self.shape.hidden // self.shape.heads,
            vocab_size=self.shape.vocab,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            use_cache=False,
        )

    def empty(self) -> nn.Module:
        """See `Family`."""
        from transformers import LlamaForCausalLM

        return gpu_common.on_meta(lambda: LlamaForCausalLM(self._config()).train(), torch.bfloat16)

    def make(self, *, recompute: bool) -> nn.Module:
        """See `Family`."""
        from transformers import LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = self._config()
        model = gpu_common.with_random_weights(lambda: LlamaForCausalLM(config).train(), torch.bfloat16)
        model.tie_weights()
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers were made without memory
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """See `Family`."""
        return model.model.layers

    def loss(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """See `Family`."""
        return model(input_ids=tokens, labels=tokens).loss

    def samples_at_once(self, batch: int, micro_tokens: int, sequence: int) -> int:
        """As many as this library takes, in equal parts: the loss is a mean."""
        at_most = max(1, min(batch, micro_tokens // sequence))
        return next(n for n in range(at_most, 0, -1) if batch % n == 0)


FAMILIES = {"plain": Plain, "transformers": Transformers}

"""Decoder shapes from published tables, by name, and modules of those shapes that need no other library.

A preset is for planning: the module is built on the meta device, and has the parameters, the products and the saved
tensors of the model it is named after, written as transformers writes it. Sources: GPT-3 (arXiv 2005.14165, table 2.1;
13B with 5120 for the printed 5140, which 40 heads of 128 make), OPT (2205.01068, table 1), Llama (2302.13971, table 2),
Llama 2 (2307.09288), Llama 3 (2407.21783, table 3), SmolLM2 (its config). GPT-3 of 30 and 66 B are OPT's shapes, as the
offloading papers use them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from offload.errors import ConfigError


@dataclass(frozen=True)
class DecoderShape:
    """A decoder-only transformer. `positions` learned positions make a GPT block (layer norms, biases, two-matrix
    MLP, `activation`); zero makes a Llama block (RMS norms, rotary positions, gated MLP, no biases)."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    intermediate: int
    key_value_heads: int
    positions: int = 0
    is_tied: bool = False
    activation: str = "gelu"


def _gpt(hidden: int, layers: int, heads: int) -> DecoderShape:
    return DecoderShape(hidden, layers, heads, 50257, 4 * hidden, heads, positions=2048, is_tied=True)


def _opt(hidden: int, layers: int, heads: int) -> DecoderShape:
    return DecoderShape(
        hidden, layers, heads, 50272, 4 * hidden, heads, positions=2050, is_tied=True, activation="relu"
    )


def _llama(
    hidden: int, layers: int, heads: int, intermediate: int, *, key_value_heads: int = 0, vocab: int = 32000
) -> DecoderShape:
    return DecoderShape(hidden, layers, heads, vocab, intermediate, key_value_heads or heads)


SHAPES: dict[str, DecoderShape] = {
    "gpt3-125m": _gpt(768, 12, 12),
    "gpt3-350m": _gpt(1024, 24, 16),
    "gpt3-760m": _gpt(1536, 24, 16),
    "gpt3-1.3b": _gpt(2048, 24, 16),
    "gpt3-2.7b": _gpt(2560, 32, 32),
    "gpt3-6.7b": _gpt(4096, 32, 32),
    "gpt3-13b": _gpt(5120, 40, 40),
    "gpt3-30b": _gpt(7168, 48, 56),
    "gpt3-66b": _gpt(9216, 64, 72),
    "gpt3-175b": _gpt(12288, 96, 96),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "smollm2-135m": DecoderShape(576, 30, 9, 49152, 1536, 3, is_tied=True),
    "llama-7b": _llama(4096, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 13824),
    "llama-33b": _llama(6656, 60, 52, 17920),
    "llama-65b": _llama(8192, 80, 64, 22016),
    "llama-70b": _llama(8192, 80, 64, 28672, key_value_heads=8),
    "llama3-8b": _llama(4096, 32, 32, 14336, key_value_heads=8, vocab=128256),
    "llama3-70b": _llama(8192, 80, 64, 28672, key_value_heads=8, vocab=128256),
    "llama-405b": _llama(16384, 126, 128, 53248, key_value_heads=8, vocab=128256),
}

ALIASES = {
    "13b": "gpt3-13b",
    "30b": "gpt3-30b",
    "66b": "gpt3-66b",
    "175b": "gpt3-175b",
    "7b": "llama-7b",
    "33b": "llama-33b",
    "65b": "llama-65b",
    "70b": "llama-70b",
    "8b": "llama3-8b",
    "405b": "llama-405b",
    "llama2-7b": "llama-7b",
    "llama2-13b": "llama-13b",
    "llama2-70b": "llama-70b",
    "llama3-405b": "llama-405b",
    "135m": "smollm2-135m",
}


def shape_of(name: str) -> DecoderShape:
    """The shape of a preset or alias, in any case. Raises ConfigError with the known names."""
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in SHAPES:
        raise ConfigError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[key]


class RMSNorm(nn.Module):
    """Root-mean-square norm of (..., width), in fp32 inside, scaled by `weight` (width,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class _Attention(nn.Module):
    """Causal attention of (batch, tokens, hidden), with grouped queries where there are fewer key and value heads."""

    def __init__(self, shape: DecoderShape, bias: bool) -> None:
        super().__init__()
        self.head_width = shape.hidden // shape.heads
        key_value = shape.key_value_heads * self.head_width
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=bias)
        self.k = nn.Linear(shape.hidden, key_value, bias=bias)
        self.v = nn.Linear(shape.hidden, key_value, bias=bias)
        self.o = nn.Linear(shape.hidden, shape.hidden, bias=bias)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """`turn`: cosines and sines, each (tokens, head width)."""
        batch, tokens, hidden = x.shape
        q, k, v = (
            project(x).view(batch, tokens, -1, self.head_width).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        if turn is not None:
            q, k = _rotated(q, *turn), _rotated(k, *turn)
        y = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o(y.transpose(1, 2).reshape(batch, tokens, hidden))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class GPTBlock(nn.Module):
    """Attention and a two-matrix MLP, each behind a layer norm, with biases."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.hidden)
        self.attention = _Attention(shape, bias=True)
        self.norm_mlp = nn.LayerNorm(shape.hidden)
        self.up = nn.Linear(shape.hidden, shape.intermediate)
        self.act = nn.GELU() if shape.activation == "gelu" else nn.ReLU()
        self.down = nn.Linear(shape.intermediate, shape.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) to the same."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.down(self.act(self.up(self.norm_mlp(x))))


class LlamaBlock(nn.Module):
    """Attention with rotary positions and a gated MLP, each behind an RMS norm, without biases."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(shape.hidden)
        self.attention = _Attention(shape, bias=False)
        self.norm_mlp = RMSNorm(shape.hidden)
        self.gate = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(batch, tokens, hidden) to the same; `turn` as in attention."""
        x = x + self.attention(self.norm_attention(x), turn)
        normed = self.norm_mlp(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    """A model of a `DecoderShape`; forward takes token ids (batch, tokens) and gives the next-token loss."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        block = GPTBlock if shape.positions else LlamaBlock
        norm = nn.LayerNorm if shape.positions else RMSNorm
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.position_embedding = nn.Embedding(shape.positions, shape.hidden) if shape.positions else None
        self.layers = nn.ModuleList(block(shape) for _ in range(shape.layers))
        self.norm = norm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if shape.is_tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the next token."""
        x = self.embedding(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        extra: tuple[object, ...] = ()
        if self.position_embedding is not None:
            x = x + self.position_embedding(places)
        else:
            width = self.shape.hidden // self.shape.heads
            rates = 10000.0 ** (-torch.arange(0, width, 2, device=tokens.device) / width)
            angles = (places[:, None] * rates).repeat(1, 2)
            extra = ((angles.cos().to(x.dtype), angles.sin().to(x.dtype)),)
        for layer in self.layers:
            x = layer(x, *extra)
        logits = self.head(self.norm(x)).float()
        labels = functional.pad(tokens[:, 1:], (0, 1), value=-100)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

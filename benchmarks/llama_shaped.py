"""A Llama-shaped decoder in plain torch, so that every side of a comparison trains the same model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    vocab: int


SHAPES = {
    "tiny": Shape(128, 4, 512, 4, 512),
    "151m": Shape(1024, 8, 4096, 16, 8192),
    "1b": Shape(2048, 16, 8192, 32, 8192),
    "3b": Shape(3072, 28, 8192, 24, 8192),
}


class Layer(nn.Module):
    """Attention with rotary positions and a gated MLP, each behind an RMS norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, self.heads = shape.hidden, shape.heads
        self.norm_attention = nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.norm_mlp = nn.RMSNorm(hidden)
        self.gate = nn.Linear(hidden, shape.intermediate, bias=False)
        self.up = nn.Linear(hidden, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`x` is (batch, tokens, hidden); `cos` and `sin` are (tokens, head size)."""
        batch, tokens, hidden = x.shape
        normed = self.norm_attention(x)
        q, k, v = (
            projection(normed).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        attended = functional.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        x = x + self.o(attended.transpose(1, 2).reshape(batch, tokens, hidden))
        normed = self.norm_mlp(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `x`, (batch, heads, tokens, head size)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LlamaShaped(nn.Module):
    """Embedding, a stack of layers, norm and head; returns the mean cross entropy of the next token.

    `recompute`: layers run again in backward. `loss_rows`: norm, head and loss take so many tokens at once and run
    again in backward too, so that the logits of a whole batch never exist; None takes all at once.
    """

    def __init__(self, shape: Shape, *, recompute: bool = False, loss_rows: int | None = None) -> None:
        super().__init__()
        self.shape, self.recompute, self.loss_rows = shape, recompute, loss_rows
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`tokens` is (batch, tokens) of int64."""
        x = self.embedding(tokens)
        head_size = self.shape.hidden // self.shape.heads
        places = torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        widths = torch.arange(0, head_size, 2, dtype=torch.float32, device=tokens.device)
        angles = torch.outer(places, 10000.0 ** (-widths / head_size)).repeat(1, 2)
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if self.recompute else layer(x, cos, sin)
        if self.loss_rows is not None:
            return self._loss_in_pieces(x, tokens, self.loss_rows)
        logits = self.head(self.norm(x))[:, :-1].float()
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    def _loss_in_pieces(self, x: torch.Tensor, tokens: torch.Tensor, n_rows: int) -> torch.Tensor:
        labels = functional.pad(tokens[:, 1:], (0, 1), value=-100).reshape(-1)
        total = x.new_zeros((), dtype=torch.float32)
        for rows, wanted in zip(x.reshape(-1, x.shape[-1]).split(n_rows), labels.split(n_rows), strict=True):
            total = total + checkpoint(
                self._loss_of, rows, wanted, use_reentrant=False, preserve_rng_state=False
            )
        return total / (tokens.shape[0] * (tokens.shape[1] - 1))

    def _loss_of(self, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.head(self.norm(rows)).float(), labels, reduction="sum")


def build(name: str, *, recompute: bool = False) -> LlamaShaped:
    """The bf16 model of that name with the same initial weights every time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaShaped(SHAPES[name], recompute=recompute)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
    return model

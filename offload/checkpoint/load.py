"""Load a model directory straight into the tiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from offload.model.causal_lm_loss import why_not_chunked
from offload.model.loading import build_model
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.wrap import wrap

DEFAULT_LEARNING_RATE = 1e-5


def load(
    directory: str,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    chunked_loss: bool = True,
    **settings: Any,
) -> tuple[nn.Module, OffloadOptimizer]:
    """Stream a Hugging Face directory of safetensors into the store: one tensor at a time, never the whole model.

    `optimizer` makes the optimizer from the parameters, such as `lambda p: torch.optim.AdamW(p, lr=2e-5)`; without it,
    AdamW at 1e-5. `dtype`: "auto" (the directory's), "bfloat16" or "float32"; fp32 files keep their full value as
    master. `chunked_loss` computes the loss in chunks of tokens where the model allows it. `settings` are those of
    `offload.wrap`. Returns (model, optimizer), the model in training mode.
    """
    model = build_model(directory, dtype)
    make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=DEFAULT_LEARNING_RATE))
    chunked_loss = chunked_loss and why_not_chunked(model) is None
    wrapped, wrapped_optimizer = wrap(model, make(model.parameters()), chunked_loss=chunked_loss, **settings)
    wrapped.offload_source = directory
    return wrapped, wrapped_optimizer

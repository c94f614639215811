"""Load a model directory straight into the tiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from offload.errors import ConfigError
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
    frozen: bool = False,
    **settings: Any,
) -> tuple[nn.Module, OffloadOptimizer]:
    """Stream a Hugging Face directory of safetensors into the store: one tensor at a time, never the whole model.

    `optimizer` makes the optimizer from the parameters, such as `lambda p: torch.optim.AdamW(p, lr=2e-5)`; without it,
    AdamW at 1e-5. `dtype`: "auto" (the directory's), "bfloat16" or "float32"; fp32 files keep their full value as
    master. `chunked_loss` computes the loss in chunks of tokens where the model allows it. `frozen` is for a model that
    is only computed with (a teacher, a reference): its parameters are all that is stored. `settings` are those of
    `offload.wrap`. Returns (model, optimizer), the model in training mode, or in evaluation mode where it is frozen.
    Raises ConfigError where a frozen model is given an optimizer.
    """
    if frozen and optimizer is not None:
        raise ConfigError("frozen=True and an optimizer: a frozen model is only computed with; leave out one")
    model = build_model(directory, dtype)
    if frozen:
        model.requires_grad_(False).eval()
    make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=DEFAULT_LEARNING_RATE))
    chunked_loss = chunked_loss and why_not_chunked(model) is None
    made = None if frozen else make(model.parameters())
    wrapped, wrapped_optimizer = wrap(model, made, chunked_loss=chunked_loss, **settings)
    wrapped.offload_source = directory
    return wrapped, wrapped_optimizer

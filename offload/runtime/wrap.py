"""`wrap`: the way in."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from offload.config import Config
from offload.errors import ConfigError, UsageError
from offload.model.blocks import base_of
from offload.model.causal_lm_loss import chunk_loss, why_not_chunked
from offload.profiling.processor import has_bfloat16_products
from offload.runtime.engine import OffloadEngine
from offload.runtime.hooks import stop_caching, stop_checkpointing
from offload.runtime.optimizer import OffloadOptimizer

logger = logging.getLogger("offload")

SLOW_BFLOAT16_PARAMETERS = 10_000_000
"""A model with fewer is soon done in any dtype."""


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    blocks: object = None,
    compute_dtype: torch.dtype | None = None,
    chunked_loss: bool = False,
    **settings: object,
) -> tuple[Any, OffloadOptimizer]:
    """Stream `model`'s training state between memory and storage. Returns the same model and a new optimizer.

    `optimizer` is a fresh one over the model's parameters, whose groups the new one shares: torch.optim.AdamW, Adam or
    SGD, Lion, and what else docs/optimizers.md lists; None for a model that is only computed with, all of it frozen.
    `blocks` names the repeated stack (a class, its name, or a list of modules) where it is not found by itself.
    `compute_dtype=torch.bfloat16` computes fp32 parameters in bf16 while their exact fp32 value stays the master.
    `chunked_loss` lets a Hugging Face causal language model compute its loss in chunks of tokens, so that the logits of
    a whole batch never exist; the model's code is not changed. Other settings: `offload.config.Config`.
    Raises BudgetError before anything is written when the budgets cannot hold the model, ConfigError for settings
    that contradict each other, UsageError for a model that is wrapped already or has been closed.
    """
    before = getattr(model, "offload", None)
    if isinstance(before, OffloadEngine):
        before.refuse_unless_open()
        raise UsageError(f"{type(model).__name__} is wrapped already: load it again to train it another way")
    _refuse_what_is_no_plain_model(model)
    _refuse_sparse_gradients(model)
    config = Config.checked(**settings)
    if compute_dtype not in (None, torch.bfloat16):
        raise ConfigError(f"compute_dtype={compute_dtype} is not supported: use torch.bfloat16 or None")
    if chunked_loss and (reason := why_not_chunked(base_of(model))) is not None:
        raise ConfigError(f"chunked_loss=True: {reason}")
    wrapped = OffloadOptimizer(
        optimizer_of_nothing(model) if optimizer is None else optimizer, config.optimizer_state
    )
    cache_again = stop_caching(model)
    dtypes = {compute_dtype, *(p.dtype for p in model.parameters())}
    n_parameters = sum(p.numel() for p in model.parameters())
    checkpoint_again = stop_checkpointing(model)
    chunked = chunk_loss(base_of(model)) if chunked_loss else None
    try:
        with torch.inference_mode(False):  # gradients are added to memory that is made here
            engine = OffloadEngine(model, wrapped, config, blocks, compute_dtype)
    except BaseException:
        checkpoint_again()
        cache_again()
        if chunked is not None:
            chunked.remove()
        raise
    if engine.aside:
        checkpoint_again()
    if torch.bfloat16 in dtypes and n_parameters >= SLOW_BFLOAT16_PARAMETERS and engine.device.type == "cpu":
        _warn_of_slow_bfloat16()
    if (n_ranks := _n_ranks()) > 1:
        logger.warning(
            "this is one of %d ranks, and offload neither shards nor averages gradients over ranks: each trains a "
            "model of its own, on what its own data loader gives it; run one process",
            n_ranks,
        )
    engine.when_closed(cache_again)
    wrapped.engine = engine
    if optimizer is not None:
        wrapped.share_groups(optimizer)
    model.zero_grad = engine.zero_grad  # type: ignore[method-assign]  # gradients are not where its own would look
    model.offload = engine  # type: ignore[assignment]  # documented attribute
    return model, wrapped


def optimizer_of_nothing(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer for a model that is only computed with (a teacher, a reference). Raises ConfigError for another."""
    trained = next((name for name, parameter in model.named_parameters() if parameter.requires_grad), None)
    if trained is not None:
        raise ConfigError(
            f"there is no optimizer, and {trained} requires gradients: give one, or call model.requires_grad_(False) "
            "where the model is only computed with"
        )
    return torch.optim.AdamW(model.parameters())


def _refuse_what_is_no_plain_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise ConfigError(
                f"{name or 'this model'} is the compiled form of a module: wrap the model with modules as they were, "
                "and give compile_blocks=True, which compiles the forward of each block"
            )
    compiled = next((n for n, m in model.named_modules() if m._compiled_call_impl is not None), None)
    if compiled is not None:
        logger.warning(
            "%s is compiled: what of it is in blocks runs uncompiled, because blocks are moved; compile_blocks=True "
            "compiles the forward of each block",
            compiled or "the model",
        )
    on_meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if on_meta is not None:
        raise ConfigError(
            f"{on_meta} is on the meta device, without data: offload.load(DIR) makes a model of a directory of "
            "weights, one tensor at a time"
        )


def _refuse_sparse_gradients(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and module.sparse
            and module.weight.requires_grad
        ):
            raise ConfigError(
                f"{name} has sparse gradients, which no update here knows: gradients are kept dense, and give the same "
                f"numbers. Make it with sparse=False, or set model.{name}.sparse = False before offload.wrap"
            )


def _n_ranks() -> int:
    """Of the process group, or those that a launcher (torchrun, accelerate) has started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    told = os.environ.get("WORLD_SIZE", "1")
    return int(told) if told.isdigit() else 1


def _warn_of_slow_bfloat16() -> None:
    if not has_bfloat16_products():
        logger.warning(
            "this processor has no instructions for bf16 products: computing in float32 (the model loaded in float32, "
            "no compute_dtype) is far faster here"
        )

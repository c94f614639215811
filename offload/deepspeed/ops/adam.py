"""`deepspeed.ops.adam`: its two classes by signature, as the torch optimizers whose update this library makes."""

from __future__ import annotations

from typing import Any

import torch

from offload.errors import ConfigError


def _made(
    params: Any, decoupled: bool, bias_correction: bool, amsgrad: bool, **given: Any
) -> torch.optim.Optimizer:
    if not bias_correction or amsgrad:
        raise ConfigError("bias_correction=False and amsgrad=True are not supported: leave them out")
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(params, **given)


def DeepSpeedCPUAdam(
    model_params: Any,
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    adamw_mode: bool = True,
    fp32_optimizer_states: bool = True,
) -> torch.optim.Optimizer:
    """A torch.optim.AdamW, or Adam with `adamw_mode=False`. Raises ConfigError for what has no counterpart."""
    if not fp32_optimizer_states:
        raise ConfigError("fp32_optimizer_states=False is not supported here: leave it out")
    return _made(
        model_params,
        adamw_mode,
        bias_correction,
        amsgrad,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
    )


def FusedAdam(
    params: Any,
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    adam_w_mode: bool = True,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    set_grad_none: bool = True,
) -> torch.optim.Optimizer:
    """A torch.optim.AdamW, or Adam with `adam_w_mode=False`. Raises ConfigError for what has no counterpart."""
    return _made(
        params, adam_w_mode, bias_correction, amsgrad, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )

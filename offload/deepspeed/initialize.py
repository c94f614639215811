"""`initialize`: DeepSpeed's signature and return tuple over this library."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from offload.deepspeed import config as configuration
from offload.deepspeed import mapping, schedules, zero
from offload.deepspeed.config import get
from offload.deepspeed.engine import DeepSpeedEngine
from offload.errors import ConfigError
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.wrap import optimizer_of_nothing, wrap

logger = logging.getLogger("offload")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, OffloadOptimizer, Any, Any]:
    """Train `model` as a DeepSpeed configuration says. Returns (engine, optimizer, training_dataloader, lr_scheduler).

    `config` is a JSON file or a dict; without it `args.deepspeed_config`. `optimizer` (an optimizer, or a callable
    that makes one from the parameters) goes before the configuration's, `lr_scheduler` (or a callable that makes one
    from the optimizer) before the configuration's. `args` may be a TrainingArguments, from which "auto" is filled.
    Raises ConfigError for keys that are unknown or refused (docs/deepspeed.md), BudgetError when it does not fit.
    """
    if model is None:
        raise ConfigError("initialize(model=...) needs a model")
    if mpu is not None or mesh_param is not None:
        raise ConfigError("mpu and mesh_param are refused: this library trains in one process")
    if type(model).__name__ == "PipelineModule":
        raise ConfigError(
            "a PipelineModule is refused: give the plain module, its blocks are streamed one by one"
        )
    n_samples = len(training_data) if hasattr(training_data, "__len__") else None
    read = configuration.read(
        _source(args, config, config_params), args=args, model=model, n_samples=n_samples
    )
    level = get(read, "log_level")
    if level is not None:
        logger.setLevel(str(level).upper())
    settings = mapping.wrap_settings(read)
    compute_dtype = mapping.cast_parameters(model, read)
    parameters = (
        [p for p in model.parameters() if p.requires_grad] if model_parameters is None else model_parameters
    )
    source = _optimizer(optimizer, read, parameters, model)
    _refuse_left_out(model, source)
    if any(parameter.requires_grad for parameter in model.parameters()):
        configuration.tell_defaults(read)
    if lr_scheduler is None:
        _scheduler(
            None, read, _stand_in(source)
        )  # what it refuses is refused while the model is still the caller's
    settings |= mapping.host_nbytes(model, read, settings)
    module, wrapped = wrap(model, source, compute_dtype=compute_dtype, **settings)
    engine = DeepSpeedEngine(module, wrapped, read)
    zero.remember(engine.offload, engine.zero_optimization_stage())
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
    engine.lr_scheduler = _scheduler(lr_scheduler, read, wrapped)
    return engine, wrapped, engine.training_dataloader, engine.lr_scheduler


def _source(args: Any, *given: Any) -> Any:
    for source in (*given, getattr(args, "deepspeed_config", None), getattr(args, "deepscale_config", None)):
        if source is not None:
            return source
    raise ConfigError("no configuration: give initialize(config=FILE or dict), or args with deepspeed_config")


def _optimizer(
    given: Any, read: Mapping[str, Any], parameters: Any, model: nn.Module
) -> torch.optim.Optimizer:
    if (
        given is None
        and get(read, "optimizer.type") is None
        and not any(p.requires_grad for p in model.parameters())
    ):
        return optimizer_of_nothing(model)
    if given is None:
        return mapping.make_optimizer(read, parameters)
    made = given if isinstance(given, torch.optim.Optimizer) else given(parameters)
    return mapping.as_torch_adam(made)


def _refuse_left_out(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for trainable parameters that no group has, by name and before anything moves."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left_out:
        raise ConfigError(
            f"{len(left_out)} trainable parameters are in no group of the optimizer, {left_out[0]} first: give all of "
            "them as model_parameters, or freeze what is not to be trained with requires_grad_(False)"
        )


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with the same hyperparameters over parameters that nobody trains."""
    groups = [{**group, "params": [nn.Parameter(torch.zeros(1))]} for group in optimizer.param_groups]
    return torch.optim.AdamW(groups)


def _scheduler(given: Any, read: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    if given is not None:
        return given if hasattr(given, "step") else given(optimizer)
    name = get(read, "scheduler.type")
    if name is None:
        return None
    return schedules.make(str(name), dict(get(read, "scheduler.params", {})), optimizer)


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command-line arguments that DeepSpeed's function of this name adds."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", action="store_true", help="accepted; the script decides")
    group.add_argument("--deepspeed_config", default=None, type=str, help="JSON file with the configuration")
    return parser

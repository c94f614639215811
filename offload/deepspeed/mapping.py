"""What a DeepSpeed configuration means in this library's terms: settings of `offload.wrap`, dtype, optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.config import Config
from offload.deepspeed.config import get
from offload.errors import ConfigError
from offload.lion import Lion
from offload.model.blocks import cut
from offload.model.flat import lay_out
from offload.planner.placement import (
    ACTIVATION_STAGING_NBYTES_MAX,
    ACTIVATION_STAGING_NBYTES_MIN,
    ACTIVATION_STAGING_SHARE,
)
from offload.runtime.assembly import block_bytes
from offload.runtime.chosen_device import choose_device
from offload.transfer.io_engine import UpdatePipeline
from offload.types import PAGE_NBYTES, round_up

logger = logging.getLogger("offload")

WRAP_ONLY = ("blocks", "chunked_loss")
"""What the section `offload` may say to `offload.wrap` that is no setting of `Config`."""

_DEVICES = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class Offloading:
    """Where the configuration wants parameters and optimizer states: "none" (the device), "cpu" or "nvme"."""

    params: str
    states: str
    directories: tuple[str, ...]
    """Of the store; empty without nvme."""
    params_in_host_max: int
    """Elements of parameters that host memory may hold."""


def offloading(config: Mapping[str, Any]) -> Offloading:
    """Read `offload_param` and `offload_optimizer`. Raises ConfigError for what DeepSpeed would not accept either."""
    zero = "zero_optimization."
    stage = get(config, zero + "stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage={stage!r}: must be 0, 1, 2 or 3")
    devices: dict[str, str] = {}
    directories: list[str] = []
    for name in ("offload_optimizer", "offload_param"):
        device = get(config, f"{zero}{name}.device", "none")
        if device not in _DEVICES:
            raise ConfigError(f'zero_optimization.{name}.device={device!r}: write "none", "cpu" or "nvme"')
        if name == "offload_param" and device == "cpu" and stage < 3:
            logger.warning(
                "zero_optimization.offload_param has no effect at stage %d, as in DeepSpeed: set stage to 3 to keep "
                "parameters in host memory",
                stage,
            )
            device = "none"
        needed = 3 if device == "nvme" else 1
        if device != "none" and stage < needed:
            raise ConfigError(
                f"zero_optimization.{name}.device={device!r} needs stage {needed}, the configuration has {stage}: "
                f"set zero_optimization.stage to {needed}"
            )
        path = get(config, f"{zero}{name}.nvme_path")
        if device == "nvme":
            if path is None:
                raise ConfigError(f'zero_optimization.{name}.device="nvme" needs nvme_path: name a directory')
            if str(path) not in directories:
                directories.append(str(path))
        devices[name] = device
    params_max = int(get(config, zero + "offload_param.max_in_cpu", 1_000_000_000))
    if devices["offload_param"] != "nvme":
        params_max = 1 << 62
    return Offloading(devices["offload_param"], devices["offload_optimizer"], tuple(directories), params_max)


def wrap_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword settings for `offload.wrap`, the section `offload` last; `host_memory` is added by `host_nbytes`."""
    wanted = offloading(config)
    settings: dict[str, Any] = {"storage": list(wanted.directories)}
    if wanted.params != "none" or wanted.states != "none":
        settings["step_aside"] = "never"
    pins = [
        get(config, f"zero_optimization.{name}.pin_memory") for name in ("offload_param", "offload_optimizer")
    ]
    if False in pins:
        settings["pin"] = "never"
    block_nbytes = get(config, "aio.block_size")
    if block_nbytes is not None:
        settings["io_block_nbytes"] = round_up(int(block_nbytes), PAGE_NBYTES)
    queue_depth = get(config, "aio.queue_depth")
    if queue_depth is not None:
        settings["io_queue_depth"] = int(queue_depth)
    if get(config, "activation_checkpointing.cpu_checkpointing", False):
        settings["activations"] = "host"
    settings.update(max_grad_norm_settings(config))
    settings.update(get(config, "offload", {}))
    return settings


def checks_overflow(config: Mapping[str, Any]) -> bool:
    """Whether a step whose gradients are not finite is to be skipped."""
    if is_fp16(config):
        return True
    return bool(get(config, "bf16.enabled", False)) and bool(get(config, "bf16.check_grad_overflow", True))


def max_grad_norm_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Clipping, overflow checks and caller-owned accumulation need every gradient before the first update."""
    clip = float(get(config, "gradient_clipping", 1.0))
    if clip > 0:
        return {"max_grad_norm": clip}
    if checks_overflow(config):
        return {"max_grad_norm": math.inf}  # the norm is computed, nothing is clipped
    if not get(config, "managed_gradient_accumulation", True):
        return {"update": "deferred"}
    return {}


def is_fp16(config: Mapping[str, Any]) -> bool:
    """Whether operations run in fp16."""
    if get(config, "fp16.enabled", False) and get(config, "bf16.enabled", False):
        raise ConfigError("fp16.enabled and bf16.enabled are both true: set one of them to false")
    return bool(get(config, "fp16.enabled", False)) or autocast_dtype(config) is torch.float16


def autocast_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of `torch.autocast` around forward; None without it."""
    if get(config, "fp16.enabled", False):
        return torch.float16
    if not get(config, "torch_autocast.enabled", False):
        return None
    name = str(get(config, "torch_autocast.dtype", "bfloat16")).removeprefix("torch.")
    dtypes = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    dtypes |= {"float16": torch.float16, "fp16": torch.float16, "half": torch.float16}
    if name not in dtypes:
        raise ConfigError(f'torch_autocast.dtype={name!r}: write "bfloat16" or "float16"')
    return dtypes[name]


def cast_parameters(model: nn.Module, config: Mapping[str, Any]) -> torch.dtype | None:
    """Bring parameters into a dtype this library trains; returns `compute_dtype` for `offload.wrap`.

    bf16: fp32 parameters keep their value as master and are computed with in bf16. Otherwise, with autocast, 16-bit
    parameters become fp32.
    """
    is_bf16 = bool(get(config, "bf16.enabled", False))
    under_autocast = not is_bf16 and autocast_dtype(config) is not None
    for parameter in model.parameters():
        if is_bf16 and parameter.dtype == torch.float16:
            parameter.data = parameter.data.to(torch.bfloat16)
        elif under_autocast and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return torch.bfloat16 if is_bf16 else None


def host_nbytes(model: nn.Module, config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, int]:
    """`host_memory` for a store: staging and as many parameters as the configuration lets host memory hold.

    Optimizer states and waiting gradients are then on storage, as in DeepSpeed. Empty where `offload.host_memory` is
    given or nothing is on storage.
    """
    wanted = offloading(config)
    if not wanted.directories or "host_memory" in settings:
        return {}
    checked = Config.checked(**{name: value for name, value in settings.items() if name not in WRAP_ONLY})
    compute_dtype = torch.bfloat16 if get(config, "bf16.enabled", False) else None
    pieces = cut(model, settings.get("blocks"))
    layouts = [
        lay_out(name, parameters, compute_dtype)
        for (name, _), parameters in zip(pieces.blocks, pieces.block_parameters, strict=True)
    ]
    sizes = [block_bytes(layout, checked.chunk_elements) for layout in layouts]
    root = block_bytes(lay_out("root", pieces.root, compute_dtype), checked.chunk_elements)
    slot = max((size.slot_nbytes for size in sizes), default=0)
    grad = max((size.grad_nbytes for size in sizes), default=0)
    always = UpdatePipeline.buffer_nbytes_required(checked.chunk_elements, checked.chunk_buffers)
    always += ACTIVATION_STAGING_NBYTES_MIN
    held = _held(layouts, sizes, wanted.params_in_host_max)
    if wanted.states != "nvme":
        held += root.state_nbytes + sum(size.state_nbytes + size.grad_nbytes for size in sizes)
    device = choose_device(model, checked)
    if (
        not device.shares_host
    ):  # the root's mirror, host slots and gradient buffers; a second of each can be filled
        always += root.slot_nbytes + root.grad_nbytes + 2 * slot + grad
        held += slot + grad
    device.close()
    if held:  # activations' staging takes its share of what is left
        held = min(math.ceil(held / (1 - ACTIVATION_STAGING_SHARE)), held + ACTIVATION_STAGING_NBYTES_MAX)
    return {"host_memory": always + round_up(held, PAGE_NBYTES)}


def _held(layouts: list[Any], sizes: list[Any], elements_max: int) -> int:
    """Bytes of the first blocks whose parameters are together no more than `elements_max`."""
    nbytes = elements = 0
    for layout, size in zip(layouts, sizes, strict=True):
        elements += sum(segment.numel for buffer in layout.buffers for segment in buffer.segments)
        if elements > elements_max:
            break
        nbytes += size.slot_nbytes
    return nbytes


_OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class _Kind:
    """What an `optimizer.type` makes, from which `optimizer.params`."""

    make: Callable[..., torch.optim.Optimizer]
    params: tuple[str, ...]


_KINDS = {
    "adam": _Kind(torch.optim.Adam, _OPTIMIZER_PARAMS),
    "adamw": _Kind(torch.optim.AdamW, _OPTIMIZER_PARAMS),
    "lion": _Kind(Lion, ("lr", "betas", "weight_decay")),
    "sgd": _Kind(torch.optim.SGD, ("lr", "momentum", "dampening", "nesterov", "weight_decay")),
    "adafactor": _Kind(torch.optim.Adafactor, ("lr", "beta2_decay", "eps", "d", "weight_decay")),
}


def make_optimizer(config: Mapping[str, Any], parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer that the section `optimizer` names, over `parameters` (tensors or groups).

    Adam means AdamW unless `adam_w_mode` is false, as in DeepSpeed, and its weight decay is 0 when it is not given.
    Raises ConfigError for another optimizer or parameter.
    """
    name = get(config, "optimizer.type")
    if name is None:
        raise ConfigError(
            "no optimizer: give initialize(optimizer=...), or a section optimizer with type and params; or call "
            "model.requires_grad_(False) where the model is only computed with"
        )
    key = str(name).lower()
    if key not in _KINDS:
        raise ConfigError(
            f"optimizer.type={name!r}: this library updates with Adam, AdamW, Lion, SGD and Adafactor; choose one"
        )
    given = dict(get(config, "optimizer.params", {}))
    if "max_grad_norm" in given:
        raise ConfigError("optimizer.params.max_grad_norm is refused: write gradient_clipping at the top")
    for ours in ("foreach", "fused", "capturable", "differentiable"):
        given.pop(ours, None)
    if key in ("adam", "adamw"):
        key = _settle_adam(key, given)
    kind = _KINDS[key]
    unknown = sorted(set(given) - set(kind.params))
    if unknown:
        raise ConfigError(f"optimizer.params.{unknown[0]}: not a parameter of {name}; known: {kind.params}")
    for pair in ("betas", "eps"):
        if isinstance(given.get(pair), list):
            given[pair] = tuple(given[pair])
    try:
        return kind.make(parameters, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.params={given}: {name} does not take these: {error}") from error


def _settle_adam(key: str, given: dict[str, Any]) -> str:
    """Which of the two it is; takes out of `given` what only says so, or says nothing."""
    adam_w_mode = bool(given.pop("adam_w_mode", True))
    neutral = {
        "bias_correction": True,
        "amsgrad": False,
        "fp32_optimizer_states": True,
        "amsgrad_mode": False,
    }
    for name, value in neutral.items():
        if given.pop(name, value) not in (value, None):
            raise ConfigError(f"optimizer.params.{name} is refused: only {value} is supported; delete it")
    if not given.pop("torch_adam", False):
        given.setdefault("weight_decay", 0.0)
    return "adamw" if key == "adamw" or adam_w_mode else "adam"


def as_torch_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """DeepSpeed's own Adam and Lion classes as the optimizer with the same groups; any other as it is."""
    name = type(optimizer).__name__
    if name in ("DeepSpeedCPULion", "FusedLion"):
        kept = ("params", *_KINDS["lion"].params)
        return Lion([{k: v for k, v in group.items() if k in kept} for group in optimizer.param_groups])
    if name not in ("DeepSpeedCPUAdam", "FusedAdam"):
        return optimizer
    decoupled = bool(getattr(optimizer, "adam_w_mode", True))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    wanted = ("params", *_OPTIMIZER_PARAMS)
    groups = [{k: v for k, v in group.items() if k in wanted} for group in optimizer.param_groups]
    return kind(groups)

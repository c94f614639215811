"""Which optimizer the user's is: its update rule, and its hyperparameters as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from offload.elementwise import ElementwiseOptimizer
from offload.errors import ConfigError
from offload.runtime.adafactor import AdafactorUpdater
from offload.runtime.chunk_update import ElementwiseUpdater
from offload.update_rules import UpdateRule, callback_rule, kernel_rule

Group = dict[str, Any]

SUPPORTED = (
    "torch.optim.AdamW, Adam and SGD, Lion (offload.Lion, or any class of that name), torch.optim.Adafactor, "
    "bitsandbytes.optim's AdamW, AdamW8bit, Lion and Lion8bit, or an offload.ElementwiseOptimizer of your own"
)

STATE_NAMES_MAX = 8


@dataclass(frozen=True)
class Recognised:
    """`values(group)` are the keyword arguments of `Hyper` that a group sets."""

    rule: UpdateRule
    values: Callable[[Group], dict[str, Any]]
    updater: Any = None
    """Of a rule made in Python: what updates pieces (`chunk_update.PieceUpdater`); `values` are the group's own."""


def _adam(decoupled: bool) -> Callable[[Group], dict[str, Any]]:
    def values(group: Group) -> dict[str, Any]:
        if group.get("amsgrad"):
            raise ConfigError("amsgrad=True is not supported: it needs a third moment per parameter")
        beta1, beta2 = map(float, group["betas"])
        return {
            "lr": float(group["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "decoupled": decoupled,
            "maximize": bool(group.get("maximize")),
        }

    return values


def _lion(group: Group) -> dict[str, Any]:
    beta1, beta2 = map(float, group["betas"][:2])
    return {
        "lr": float(group["lr"]),
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": float(group["weight_decay"]),
        "maximize": bool(group.get("maximize")),
    }


def _sgd(has_momentum: bool) -> Callable[[Group], dict[str, Any]]:
    def values(group: Group) -> dict[str, Any]:
        momentum = float(group["momentum"])
        if momentum and not has_momentum:
            raise ConfigError(
                f"momentum={momentum} in a group of an optimizer that was wrapped without momentum: no memory was made "
                "for it; give some group momentum when the optimizer is made"
            )
        return {
            "lr": float(group["lr"]),
            "momentum": momentum,
            "dampening": float(group["dampening"]),
            "nesterov": bool(group["nesterov"]),
            "weight_decay": float(group["weight_decay"]),
            "maximize": bool(group.get("maximize")),
        }

    return values


def _of_bitsandbytes(source: torch.optim.Optimizer, moments: str) -> Recognised | None:
    """Its Adam and AdamW both decay weights apart from the gradient. Names with 8bit mean 8-bit moments."""
    if not type(source).__module__.startswith("bitsandbytes."):
        return None
    name = type(source).__name__.removeprefix("Paged").removesuffix("32bit")
    base = name.removesuffix("8bit")
    if name != base and moments == "fp32":
        moments = "8bit"
    if base == "AdamW":
        return Recognised(kernel_rule("adamw", moments), _adam(True))
    if base == "Lion":
        return Recognised(kernel_rule("lion", moments), _lion)
    return None


def _own_values(group: Group) -> dict[str, Any]:
    return {
        name: value.item() if isinstance(value, torch.Tensor) else value
        for name, value in group.items()
        if name != "params"
    }


def _in_python(source: torch.optim.Optimizer, moments: str) -> Recognised | None:
    """Optimizers whose update Python makes."""
    name = type(source).__name__
    if isinstance(source, torch.optim.Adafactor):
        parameters = [p for group in source.param_groups for p in group["params"]]
        updater: Any = AdafactorUpdater({p: number for number, p in enumerate(parameters)})
        rule = callback_rule("adafactor", (), whole_gradients=True)
    elif isinstance(source, ElementwiseOptimizer):
        if len(source.state_names) > STATE_NAMES_MAX or len(set(source.state_names)) < len(
            source.state_names
        ):
            raise ConfigError(
                f"{name}.state_names={source.state_names}: give at most {STATE_NAMES_MAX} different names"
            )
        updater = ElementwiseUpdater(source)
        rule = callback_rule(name, source.state_names)
    else:
        return None
    if moments != "fp32":
        raise ConfigError(f"optimizer_state={moments!r}: {name} keeps its state in fp32; leave it out")
    return Recognised(rule, _own_values, updater)


def _unsupported(source: object) -> ConfigError:
    """What to use in place of this optimizer."""
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    if isinstance(source, list | tuple | dict):
        return ConfigError(
            f"{len(source)} optimizers were given: give one, whose groups have the parameters and the hyperparameters "
            "of each; one model is updated by one kind of optimizer"
        )
    message = f"{kind} is not supported: use one of {SUPPORTED}"
    if type(source).__name__ == "Adafactor":
        message += (
            ". In place of TrainingArguments' optim='adafactor', give the Trainer "
            "optimizer_cls_and_kwargs=(torch.optim.Adafactor, {'lr': 1e-2}), or optimizers=(optimizer, None)"
        )
    return ConfigError(message)


def recognise(source: torch.optim.Optimizer, moments: str) -> Recognised:
    """The rule of `source` with moments in "fp32", "bf16" or "8bit". Raises ConfigError for what is not supported."""
    found = _of_bitsandbytes(source, moments) or _in_python(source, moments)
    if found is None and isinstance(source, torch.optim.AdamW):
        found = Recognised(kernel_rule("adamw", moments), _adam(True))
    if found is None and isinstance(source, torch.optim.Adam):
        decoupled = bool(source.defaults.get("decoupled_weight_decay", False))
        found = Recognised(kernel_rule("adamw", moments), _adam(decoupled))
    if found is None and isinstance(source, torch.optim.SGD):
        has_momentum = any(group["momentum"] for group in source.param_groups)
        rule = kernel_rule("sgd", moments, has_momentum=has_momentum)
        found = Recognised(rule, _sgd(has_momentum))
    if found is None and type(source).__name__ == "Lion":
        found = Recognised(kernel_rule("lion", moments), _lion)
    if found is None:
        raise _unsupported(source)
    for group in source.param_groups:
        try:
            found.values(group)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{type(source).__name__}: a group lacks what it needs, or has it in another form: {error!r}"
            ) from error
    return found

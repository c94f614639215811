"""Gradients that the engine has taken out of `.grad`: whoever looks for one there is told where it is.

[Note: taken gradients] A gradient goes on to its update as soon as it is there, so between backward and `zero_grad` a
parameter's `.grad` is empty. Code that reads it would go on as if there were no gradient: `clip_grad_norm_` would clip
nothing, a GradScaler would unscale nothing, a log would show no norm. So from the moment its gradient is taken until
`zero_grad`, a parameter is of a class of its own whose `.grad` raises, and of its own class again after that. The same
goes the other way: what somebody puts into `.grad` by hand would be ignored, and `step()` refuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from offload.errors import UsageError

_slot: Any = torch.Tensor.grad
_NAME = "_offload_taken_as"

_REMEDY = (
    "Clip with offload.wrap(..., max_grad_norm=1.0) and leave clip_grad_norm_ out; the norm is optimizer.grad_norm "
    "after step(). In place of a GradScaler compute in bf16, or let offload.deepspeed or OffloadTrainer scale. "
    "To read or change a gradient as it comes, use parameter.register_hook"
)


def grad_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """What autograd has put into `.grad`, whatever class the parameter is of."""
    grad: torch.Tensor | None = _slot.__get__(parameter)
    return grad


def take(parameter: torch.Tensor, name: str) -> None:
    """Empty `.grad`, and refuse it to readers until `give_back`. `name`: how the message calls the parameter."""
    _slot.__set__(parameter, None)
    if _NAME not in parameter.__dict__:
        setattr(parameter, _NAME, name)
        parameter.__class__ = _refusing(type(parameter))


def give_back(parameters: Iterable[torch.Tensor]) -> None:
    """Let `.grad` be what it is for every tensor again."""
    for parameter in parameters:
        if parameter.__dict__.pop(_NAME, None) is not None:
            parameter.__class__ = type(parameter).__mro__[1]


def refuse_by_hand(parameters: Iterable[torch.Tensor]) -> None:
    """Raise UsageError where `.grad` holds something: a step would not see it."""
    for parameter in parameters:
        if grad_of(parameter) is not None:
            raise UsageError(
                f"a parameter of shape {tuple(parameter.shape)} has a .grad that this step would not see: it was put "
                "there by hand, or the parameter was frozen when offload.wrap was called. Change gradients in "
                "parameter.register_hook, and unfreeze before offload.wrap"
            )


@functools.cache
def _refusing(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """A subclass of `kind`, under its name, whose `.grad` cannot be read."""

    def read(parameter: torch.Tensor) -> torch.Tensor | None:
        name = parameter.__dict__.get(_NAME)
        if name is None or torch.compiler.is_compiling():  # a copy; or the compiler, which asks every tensor
            return grad_of(parameter)
        raise UsageError(f"{name}: its gradient is not in .grad, the engine has taken it. {_REMEDY}")

    def write(parameter: torch.Tensor, value: torch.Tensor | None) -> None:
        _slot.__set__(parameter, value)

    members = {
        "grad": property(read, write),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind,), members)

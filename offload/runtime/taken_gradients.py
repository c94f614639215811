"""Gradients that the engine has taken out of `.grad`: whoever looks for one there is told where it is.

[Note: taken gradients] A gradient goes on to its update as soon as it is there, so between backward and `zero_grad` a
parameter's `.grad` is empty. Code that reads it would go on as if there were no gradient: `clip_grad_norm_` would clip
nothing, a GradScaler would unscale nothing, a log would show no norm. So from the moment its gradient is taken until
`zero_grad`, a parameter is of a class of its own whose `.grad` raises, and of its own class again after that. The same
goes the other way: what somebody puts into `.grad` by hand would be ignored, and `step()` refuses it. Who sets it to
None, or calls the `zero_grad` of a module that the model is in, wants the gradient forgotten: that of all parameters is
what the model's `zero_grad` does, that of some is refused.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from offload.errors import UsageError
from offload.stores.block_store import BlockRecord

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


_n_emptied = 0


def n_emptied() -> int:
    """How often `.grad` has been set to None in place of a gradient that had been taken."""
    return _n_emptied


def _count_emptied() -> None:
    global _n_emptied  # of the process, as the class of a parameter is
    _n_emptied += 1


class Emptied:
    """What has become of gradients that wait when their `.grad` is set to None, seen by one engine."""

    def __init__(self) -> None:
        self._n_seen = n_emptied()

    def settle(self, blocks: Iterable[BlockRecord], discard: Callable[[], None]) -> None:
        """Call `discard` where all gradients that wait have been emptied. Raises UsageError where some of them have."""
        if self._n_seen == n_emptied():
            return
        self._n_seen = n_emptied()
        waiting = [
            segment
            for block in blocks
            if block.touched and not block.pending_update
            for buffer in block.layout.buffers
            for segment in buffer.segments
            if id(segment.parameter) in block.touched
        ]
        emptied = [segment for segment in waiting if _NAME not in segment.parameter.__dict__]
        if emptied and len(emptied) < len(waiting):
            raise UsageError(
                f"{emptied[0].name}: its .grad has been set to None, those of other parameters have not: discard all "
                "of them with optimizer.zero_grad(), or leave this parameter out with requires_grad_(False)"
            )
        if emptied:
            discard()


@functools.cache
def _refusing(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """A subclass of `kind`, under its name, whose `.grad` cannot be read."""

    def read(parameter: torch.Tensor) -> torch.Tensor | None:
        name = parameter.__dict__.get(_NAME)
        if name is None or torch.compiler.is_compiling():  # a copy; or the compiler, which asks every tensor
            return grad_of(parameter)
        reader = sys._getframe(1).f_code
        if reader is nn.Module._apply.__code__:
            return None  # for `model.cpu()` and the like there is none to move
        if reader is nn.Module.zero_grad.__code__:  # of a module that the model is in
            write(parameter, None)
            return None
        raise UsageError(f"{name}: its gradient is not in .grad, the engine has taken it. {_REMEDY}")

    def write(parameter: torch.Tensor, value: torch.Tensor | None) -> None:
        if value is None and _NAME in parameter.__dict__:
            give_back([parameter])
            _count_emptied()
        _slot.__set__(parameter, value)

    members = {
        "grad": property(read, write),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind,), members)

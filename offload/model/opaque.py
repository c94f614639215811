"""Tensors that a block gets or returns inside an object that torch's pytree does not know, where no gradient sees them.

A block is one autograd node: its gradients go through the tensors that are its arguments and results. One inside an
object that pytree takes for a leaf is neither. It would leave the block without its gradient, and all below would go
untrained without a word, so such a call is refused.
"""

from __future__ import annotations

import enum
import functools
import logging
import types
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload.errors import UsageError

logger = logging.getLogger("offload")

_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout, slice}
)  # fmt: skip
_HOLD_NO_RESULT = (torch.Tensor, nn.Module, enum.Enum, type, types.FunctionType, types.BuiltinFunctionType)
_DEPTH = 3
"""How far objects are looked for in objects."""


def opaque(leaves: Iterable[Any]) -> list[Any]:
    """Those that are no tensors and no plain values."""
    return [x for x in leaves if type(x) not in _PLAIN and not isinstance(x, _HOLD_NO_RESULT)]


def _attributes(thing: Any) -> list[Any]:
    found: list[Any] = []
    if isinstance(thing, Mapping):
        found += thing.values()
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        found += thing
    found += getattr(thing, "__dict__", {}).values()
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        found += [getattr(thing, n, None) for n in ((slots,) if isinstance(slots, str) else slots)]
    return found


def tensors_in(thing: Any, depth: int = _DEPTH) -> list[torch.Tensor]:
    """Tensors that an object holds, in attributes and items, and in objects there."""
    leaves = pytree.tree_leaves(_attributes(thing))
    found = [x for x in leaves if isinstance(x, torch.Tensor)]
    if depth > 1:
        for inner in opaque(leaves):
            found += tensors_in(inner, depth - 1)
    return found


def _refusal(block_name: str, what: str, thing: Any) -> UsageError:
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    return UsageError(
        f"block {block_name} {what} a {kind} with tensors in it, which torch's pytree does not know: gradients would "
        "end there, and what is below would not be trained. Tell it how to take one apart, with torch.utils._pytree."
        f"register_pytree_node({type(thing).__qualname__}, flatten, unflatten), or use a tuple or a dictionary"
    )


def given_in(block_name: str, things: list[Any], n_samples: int, n_micro: int) -> list[torch.Tensor]:
    """The tensors in the objects that a block is given. Raises UsageError for those that have come from other
    operations and want their gradient, and for those that micro-batches would have to cut."""
    found: list[torch.Tensor] = []
    for thing in things:
        for tensor in tensors_in(thing):
            if tensor.grad_fn is not None:
                raise _refusal(block_name, "is given", thing)
            if n_micro > 1 and tensor.dim() and tensor.shape[0] == n_samples:
                raise UsageError(
                    f"micro-batches: block {block_name} is given a {type(thing).__qualname__} that holds a tensor of "
                    f"shape {tuple(tensor.shape)}, which cannot be cut there: tell torch's pytree how to take it apart "
                    "(torch.utils._pytree.register_pytree_node), or use micro_batches=1"
                )
            found.append(tensor)
    return found


def refuse_new_in(block_name: str, what: str, things: list[Any], before: list[torch.Tensor]) -> None:
    """Raise UsageError when one of these objects holds a tensor that could have a gradient and was not there before."""
    known = set(map(id, before))
    for thing in things:
        for tensor in tensors_in(thing):
            if id(tensor) not in known and (tensor.is_floating_point() or tensor.is_complex()):
                raise _refusal(block_name, what, thing)


def refuse_new_leaf(block_name: str, before: list[Any], after: list[Any]) -> None:
    """Raise UsageError when a block has changed a list or dictionary that it was given, as `before` and `after` show:
    it was given a copy, whose changes nobody sees."""
    known = set(map(id, before))
    for leaf in after:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and id(leaf) not in known:
            raise UsageError(
                f"block {block_name} puts a tensor of shape {tuple(leaf.shape)} into a list or dictionary that it was "
                "given: nobody outside would see it, or its gradient. Let the block return it"
            )
    if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
        raise UsageError(
            f"block {block_name} changes a list or dictionary that it was given: it was given a copy, and nobody "
            "outside would see it. Let the block return what changes, or keep it in an attribute of the block"
        )


def tell_of_left_behind(modules: Iterable[nn.Module]) -> None:
    """Say once for each attribute that these modules, which have just run with gradients, hold a result in it: who
    reads it outside of the block gets that of forward, which has no gradient. It may be meant for nobody."""
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or not isinstance(value, torch.Tensor | list | tuple | dict):
                continue
            if any(isinstance(x, torch.Tensor) and x.grad_fn is not None for x in pytree.tree_leaves(value)):
                by_hook = {
                    f"{name}_orig",
                    f"{name}_g",
                } & module._parameters.keys()  # torch's older norms of weights
                if not by_hook:
                    _tell_once(type(module).__qualname__, name)


@functools.cache
def _tell_once(kind: str, name: str) -> None:
    logger.warning(
        "%s leaves a result of its block's forward in its attribute %r. Outside of the block it has no gradient, so a "
        "loss that is made of it trains nothing: let the block return it, or detach it if it is only looked at",
        kind,
        name,
    )

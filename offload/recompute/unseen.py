"""Readers of a block's results that dispatch does not see, so that a recipe does not skip what they read.

[Note: unseen readers] A recipe skips an operation whose result nobody reads (recipe.py). Autograd tells what it saves.
But backward may need more: what a hook on a tensor or a node has closed over, what an autograd.Function keeps as an
attribute of its context, what `torch.utils.checkpoint` runs again, what is packed by hooks of the block's own; and
Python may look at a result's memory (`tolist`, `numpy`). The graph shows Functions, the rest shows when it is called.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from offload.model import opaque

_Tensor: Any = torch.Tensor
_LOOK_AT_MEMORY = frozenset(
    (
        _Tensor.tolist,
        _Tensor.numpy,
        _Tensor.__array__,
        _Tensor.__dlpack__,
        _Tensor.data_ptr,
        _Tensor.untyped_storage,
    )
)
_HOOK = frozenset((_Tensor.register_hook, _Tensor.register_post_accumulate_grad_hook))


class Watcher(TorchFunctionMode):
    """Calls `tell(why)` when the block makes a reader that no recipe knows of."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LOOK_AT_MEMORY:
            self._tell("it looks at the memory of a result")
        elif func in _HOOK or getattr(func, "__self__", None) is _Tensor.grad_fn:
            self._tell("it has hooks on what it computes, or looks at its graph")
        return func(*args, **(kwargs or {}))


def in_graph(
    outputs: Iterable[torch.Tensor], read: Callable[[torch.Tensor], None], tell: Callable[[str], None]
) -> None:
    """Call `read` for what contexts of autograd.Functions hold beside saved tensors, in the graph of `outputs`, and
    `tell` where one may run more than is seen."""
    waiting: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
        if not isinstance(node, torch._C._FunctionBase):
            continue
        for tensor in opaque.tensors_in(node):
            read(tensor)
        if any(_may_run_more(value) for value in vars(node).values()):
            tell("one of its autograd.Functions runs a function that it was given")


def _may_run_more(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return bool(value.__closure__)
    return isinstance(value, types.MethodType | functools.partial)

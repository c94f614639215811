"""Recomputation of a block that runs only what backward needs and nobody has kept, along its recipe.

[Note: seeing no more than has to be seen] What follows a recipe sees operations through a dispatch mode in Python, that
costs the launching thread more than most operations do. It has to see them from the first that it changes on: only
later ones can read what that gives. So it begins where the block last enters a submodule before it, and what comes
earlier runs as it does without: where nothing is kept, all but the last product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from offload.recompute.module_hooks import before_submodules
from offload.recompute.recipe import UNCOUNTED, Entry, Recipe, Recorder, TensorMade
from offload.recompute.unseen import Watcher

_SUMS = "compute_log_sumexp"


class Departed(Exception):
    """The block does other operations than it did when the recipe was written."""


class _Follower(TorchDispatchMode):
    """Counts operations along a recipe from `entry` on (None: from the first); `matches` turns False as soon as another
    operation comes."""

    def __init__(self, recipe: Recipe, entry: Entry | None) -> None:
        super().__init__()
        self.recipe = recipe
        self.entry = entry
        self.matches = True
        self._index = -1 if entry is None else entry.op - 1

    def _next(self, func: Any) -> int:
        if func._overloadpacket.__name__ in UNCOUNTED:
            return -1
        self._index += 1
        ops = self.recipe.ops
        if self._index >= len(ops) or ops[self._index].func is not func:
            self.matches = False
        return self._index


@contextlib.contextmanager
def recording(recorder: Recorder, block: nn.Module | None) -> Iterator[None]:
    """Let `recorder` see what `block` computes inside, what autograd saves, and where it enters a submodule. See also
    [Note: unseen readers] in unseen.py."""
    within = {} if block is None else {name: module for name, module in block.named_modules() if name}
    with (
        recorder,
        Watcher(recorder.cannot),
        before_submodules(within, recorder.entered),
        torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda tensor: tensor),
    ):
        yield


@contextlib.contextmanager
def following(mode: _Follower, block: nn.Module | None) -> Iterator[None]:
    """Let `mode` see what `block` computes inside, from the mode's entry on: nothing, where that does not come."""
    entry = mode.entry
    if entry is None or block is None:
        with mode:
            yield
        return
    n_entered, depth = 0, torch._C._len_torch_dispatch_stack()
    with contextlib.ExitStack() as stack:

        def entered(_: str) -> None:
            nonlocal n_entered
            n_entered += 1
            if n_entered == entry.nth and torch._C._len_torch_dispatch_stack() == depth:
                stack.enter_context(mode)

        with before_submodules({entry.module: block.get_submodule(entry.module)}, entered):
            yield


class Keeper(_Follower):
    """Forward: hands the results of `chosen` operations out, in `kept` by operation."""

    def __init__(self, recipe: Recipe, chosen: frozenset[int]) -> None:
        super().__init__(recipe, recipe.entry_before(min(chosen)))
        self._chosen = chosen
        self.kept: dict[int, list[torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        index = self._next(func)
        if not self.matches or index not in self._chosen:
            return func(*args, **(kwargs or {}))
        args, kwargs = _for_backward(func, args, kwargs or {})
        result = func(*args, **kwargs)
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        wanted = self.recipe.ops[index].tensors
        if [(t.shape, t.dtype) for t in made] != [(t.shape, t.dtype) for t in wanted]:
            self.matches = False  # without gradients it gives less, as a recurrent layer does
        self.kept[index] = made
        return result


def _for_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments with which fused attention also gives the sums that only backward needs."""
    names = [argument.name for argument in func._schema.arguments]
    if _SUMS not in names:
        return args, kwargs
    position = names.index(_SUMS)
    if position < len(args):
        return (*args[:position], True, *args[position + 1 :]), kwargs
    return args, {**kwargs, _SUMS: True}


def unread(made: TensorMade) -> torch.Tensor:
    """Stands for the result of a skipped operation."""
    return torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device=made.device)


class Replayer(_Follower):
    """Backward: gives back what was kept, skips what nobody needs, runs the rest."""

    def __init__(self, recipe: Recipe, kept: Mapping[int, list[torch.Tensor]]) -> None:
        first = recipe.first_changed(frozenset(kept))
        super().__init__(recipe, None if first is None else recipe.entry_before(first))
        self._kept = dict(kept)
        self._runs = recipe.must_run(frozenset(kept))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        index = self._next(func)
        if not self.matches:
            raise Departed
        if index < 0:
            return func(*args, **(kwargs or {}))
        op = self.recipe.ops[index]
        if index not in self._kept and (index in self._runs or op.is_free):
            return func(*args, **(kwargs or {}))
        kept = self._kept.pop(index, None)
        tensors = iter(kept if kept is not None else map(unread, op.tensors))
        results = [next(tensors) if isinstance(made, TensorMade) else made for made in op.outputs]
        return results[0] if len(results) == 1 else tuple(results)

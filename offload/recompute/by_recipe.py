"""Recomputation of a block that runs only what backward needs and nobody has kept, along its recipe.

[Note: seeing no more than has to be seen] What follows a recipe sees operations through a dispatch mode in Python, that
costs the launching thread more than most operations do. It has to see them from the first that it changes on: only
later ones can read what that gives. So it begins where the block last enters a submodule before it, and what comes
earlier runs as it does without: where nothing is kept, all but the last product.
"""

from __future__ import annotations

import contextlib
import functools
import types
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


def _keep_compiler_out(code: types.CodeType) -> bool:
    """Whether this torch can be told that neither `code` nor what it calls is to be compiled, by whatever has the
    compiler look at it: a part of a block, the model around it."""
    try:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):  # names and arguments of torch's own, which may change
        return False
    return True


class Departed(Exception):
    """The block does other operations than it did when the recipe was written."""


class _Follower(TorchDispatchMode):
    """Counts operations along a recipe from `entry` on (None: from the first); `matches` turns False as soon as another
    operation comes."""

    def __init__(self, recipe: Recipe, entry: Entry | None) -> None:
        super().__init__()
        self.recipe = recipe
        self.entry = entry
        self._funcs = recipe.funcs
        self._at = 0 if entry is None else entry.op
        """The operation that comes next; -1 once another has come."""

    @property
    def matches(self) -> bool:
        return self._at >= 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch asks this of every subclass, to wrap its `__torch_dispatch__` in functions that keep its compiler
        out: they take longer than what they wrap. Marking its code does the same."""
        dispatch = cls.__dict__.get("__torch_dispatch__")
        return dispatch is not None and not _keep_compiler_out(dispatch.__code__)

    def _depart(self) -> None:
        self._at = -1  # where `funcs` has None

    def _next(self, func: Any) -> int:
        """Which operation of the recipe it is; -1: none of them."""
        index = self._at
        if self._funcs[index] is func:
            self._at = index + 1
            return index
        if func._overloadpacket.__name__ not in UNCOUNTED:  # of which a recipe has none
            self._depart()
        return -1


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
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        index = self._next(func)
        if index not in self._chosen:
            return func(*args, **kwargs) if kwargs else func(*args)
        args, kwargs = _for_backward(func, args, kwargs or {})
        result = func(*args, **kwargs)
        leaves = [result] if isinstance(result, torch.Tensor) else pytree.tree_leaves(result)
        made = [t for t in leaves if isinstance(t, torch.Tensor)]
        wanted = self.recipe.ops[index].tensors
        if [(t.shape, t.dtype) for t in made] != [(t.shape, t.dtype) for t in wanted]:
            self._depart()  # without gradients it gives less, as a recurrent layer does
        self.kept[index] = made
        return result


@functools.cache
def _sums_at(func: Any) -> int:
    """Which argument asks for the sums that only backward needs; -1 where none does."""
    names = [argument.name for argument in func._schema.arguments]
    return names.index(_SUMS) if _SUMS in names else -1


def _for_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments with which fused attention also gives the sums that only backward needs."""
    position = _sums_at(func)
    if position < 0:
        return args, kwargs
    if position < len(args):
        return (*args[:position], True, *args[position + 1 :]), kwargs
    return args, {**kwargs, _SUMS: True}


def unread(made: TensorMade) -> torch.Tensor:
    """Stands for the result of a skipped operation."""
    return torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device=made.device)


class Replayer(_Follower):
    """Backward: gives back what was kept, skips what nobody needs, runs the rest."""

    def __init__(self, recipe: Recipe, kept: Mapping[int, list[torch.Tensor]]) -> None:
        chosen = frozenset(kept)
        first = recipe.first_changed(chosen)
        super().__init__(recipe, None if first is None else recipe.entry_before(first))
        self._kept = dict(kept)
        self._changed = recipe.changed(chosen)

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        index = self._next(func)
        if index < 0 and not self.matches:
            raise Departed
        if index < 0 or not self._changed[index]:
            return func(*args, **kwargs) if kwargs else func(*args)
        op = self.recipe.ops[index]
        kept = self._kept.pop(index, None)
        tensors = kept if kept is not None else [unread(made) for made in op.tensors]
        if len(op.outputs) == 1:
            return tensors[0]
        given = iter(tensors)
        return tuple([next(given) if isinstance(made, TensorMade) else made for made in op.outputs])

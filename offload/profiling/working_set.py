"""The most bytes that are alive at once while a block, or the root, is computed forth and back: traced without data.

[Note: what is alive] A block goes backward as the runtime runs it: forward again with its graph, then backward, each
parameter's gradient dropped as soon as it is made (it moves to the gradient plane). Every operation below autograd is
seen, and after each the bytes of all storages that still exist are added up, so the peak follows from the same
references that hold tensors in a real run. Inputs, parameters and buffers are not counted; the gradient of the block's
output is. The scratch memory of single kernels is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from offload.profiling import meta_device
from offload.profiling.trace import ROOT

HELD = -2
"""The position of what the root holds while backward goes through the blocks."""
EARLY = -3
"""The position of how many of the root's parameters have their gradients before that."""

BlockCall = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional and named arguments of a block, and what it returned."""


class WithoutData(TorchDispatchMode):
    """Runs every operation inside on the meta device where there is no data for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return meta_device.run(func, args, kwargs or {})


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations inside have made and that still exist: `history` has a sum an operation."""

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._given = {int(t.untyped_storage()._cdata): t.untyped_storage() for t in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.history: list[int] = []

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made outside."""
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self._given and key not in self._alive:
            self._alive[key] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = meta_device.run(func, args, kwargs or {})
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        self.history.append(sum(nbytes for _, nbytes in self._alive.values()))
        return result


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph, wanting a gradient where it wanted one."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@contextmanager
def _gradients_leave(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A gradient is dropped as soon as it has been made. Gives the parameters, in the order of their gradients."""
    made: list[torch.Tensor] = []

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None
        made.append(parameter)

    handles = [
        p.register_post_accumulate_grad_hook(drop)
        for p in dict.fromkeys(model.parameters())
        if p.requires_grad
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def standing_in(
    blocks: Sequence[tuple[str, nn.Module]], forward: Callable[[int, Any, Any, Any], Any]
) -> Iterator[None]:
    """`forward(position, original, args, kwargs)` runs in place of each block's forward."""
    before = [module.__dict__.get("forward") for _, module in blocks]
    try:
        for position, (_, module) in enumerate(blocks):

            def run(*args: Any, _p: int = position, _original: Any = module.forward, **kwargs: Any) -> Any:
                return forward(_p, _original, args, kwargs)

            module.forward = run
        yield
    finally:
        for (_, module), held in zip(blocks, before, strict=True):
            module.__dict__.pop("forward", None)
            if held is not None:
                module.forward = held


def _loss_of(output: Any) -> list[torch.Tensor]:
    """What a training step calls backward on: `loss`, or the outputs that have a gradient."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return [loss]
    return [t for t in _tensors(output) if t.requires_grad][:1]


def _backward(outputs: list[torch.Tensor]) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])


def _block_history(module: nn.Module, call: BlockCall, given: list[torch.Tensor]) -> list[int]:
    args, kwargs = call[:2]
    with (
        torch.enable_grad(),
        meta_device.FusedOperations(),
        LiveBytes([*given, *_tensors((args, kwargs))]) as mode,
    ):
        outputs = [t for t in _tensors(module(*args, **kwargs)) if t.requires_grad]
        _backward(outputs)
    return mode.history


def _root_history(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    calls: list[BlockCall],
    args: Any,
    kwargs: Any,
    made: list[torch.Tensor],
) -> tuple[list[int], list[int], int]:
    """Live bytes after each operation; those when backward goes through the blocks (the gradient of a tied head waits
    then for that of the embedding); and how many of the root's parameters have their gradients before. Blocks hand on
    what they are given, in the form in which they returned it. `made` is filled with the parameters that get gradients.
    """

    def hand_on(position: int, _original: Any, given: Any, named: Any) -> Any:
        inputs = [t for t in _tensors((given, named)) if t.is_floating_point()]

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            same = next((x for x in inputs if x.shape == tensor.shape), None)
            if same is None:
                return tensor
            handed_on = same.view_as(same)
            if handed_on.requires_grad:
                handed_on.register_hook(blocks_begin)
            return handed_on

        return pytree.tree_map_only(torch.Tensor, stand_in, calls[position][2])

    def blocks_begin(_grad: torch.Tensor) -> None:
        if not held:
            early.extend(made)
        held.append(mode.history[-1])

    held: list[int] = []
    early: list[torch.Tensor] = []
    made.clear()
    given = [*model.parameters(), *model.buffers(), *_tensors((args, kwargs)), *_tensors(calls)]
    with (
        torch.enable_grad(),
        standing_in(blocks, hand_on),
        meta_device.FusedOperations(),
        LiveBytes(given) as mode,
    ):
        losses = _loss_of(model(*args, **kwargs))  # whatever else the model returns is let go, logits too
        if losses and losses[0].requires_grad:
            _backward(losses)
    times = Counter(map(id, made))
    return mode.history, held, sum(p.numel() for p in early if times[id(p)] == 1)


def trace_live_bytes(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[int, list[int]]:
    """Live bytes after each operation: of each block's recomputation and backward by its position, of the root's
    forward and backward under `ROOT`, and of what the root holds while blocks go backward under `HELD`. Under `EARLY`,
    how many of the root's parameters have their gradients before.

    Equal blocks (same class, same parameters, same argument shapes) are traced once. See [Note: what is alive].
    """
    calls: dict[int, BlockCall] = {}

    def remember(position: int, original: Any, given: Any, named: Any) -> Any:
        result = original(*given, **named)
        calls[position] = pytree.tree_map_only(torch.Tensor, _leaf, (given, named, result))
        return result

    with (
        torch.enable_grad(),
        standing_in(blocks, remember),
        meta_device.FusedOperations(),
        WithoutData(),
    ):
        model(*args, **kwargs)
    found: dict[int, list[int]] = {}
    known: dict[Any, list[int]] = {}
    given = [*model.parameters(), *model.buffers()]
    with _gradients_leave(model) as made:
        for position, call in sorted(calls.items()):
            module = blocks[position][1]
            kind = (
                type(module),
                tuple((p.shape, p.dtype, p.requires_grad) for p in module.parameters()),
                tuple((t.shape, t.dtype) for t in _tensors(call[:2])),
            )
            if kind not in known:
                known[kind] = _block_history(module, call, given)
            found[position] = known[kind]
        found[ROOT], found[HELD], early_numel = _root_history(
            model, blocks, [calls[i] for i in sorted(calls)], args, kwargs, made
        )
        found[EARLY] = [early_numel]
    return found


def envelope(two: list[int], three: list[int]) -> tuple[tuple[int, int], ...]:
    """(fixed bytes, bytes a sample) of every operation that is the peak at some number of samples.

    `two` and `three` are the histories with two and with three samples; operation by operation their difference is
    what a sample adds. Empty where the two did not do the same operations: then nothing can be said.
    """
    if len(two) != len(three):
        return ()
    lines = sorted({(b - a, 3 * a - 2 * b) for a, b in zip(two, three, strict=True)}, reverse=True)
    kept: list[tuple[int, int]] = []
    for grown_nbytes, fixed_nbytes in lines:  # fewer bytes a sample matter only with more fixed ones
        if grown_nbytes >= 0 and (not kept or fixed_nbytes > kept[-1][0]):
            kept.append((fixed_nbytes, grown_nbytes))
    return tuple(kept)

"""A block as one autograd node: forward and backward run micro-batch by micro-batch inside it.

[Note: what is saved] By default only the block's inputs are kept (device, host or storage) and forward runs again in
backward, with the generators, the state and the settings of the first run (generators.py, forward_state.py,
surroundings.py), all of which are then as they were before it. With the policy `keep`, the graph of
the first run is kept instead, and parameters in it are saved by reference: a saved-tensor hook notes which part of the
block's slot a saved tensor is, so the block may be evicted and fetched again before backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload.errors import UsageError
from offload.model import captured, microbatch, opaque
from offload.recompute import block_inputs, other_backwards, surroundings, unseen
from offload.recompute.block_inputs import Versions
from offload.recompute.by_recipe import Departed, Keeper, Replayer, following, recording
from offload.recompute.first_results import Samples
from offload.recompute.forward_state import ForwardState, Now, Seen
from offload.recompute.generators import global_states, put_global_states
from offload.recompute.kept_graph import saved_by_reference
from offload.recompute.recipe import SMALL_NBYTES, Recipe, Recorder
from offload.stores.activations import Activation, ActivationStore, Tier
from offload.stores.block_store import BlockRecord

_COPY = "let it work on a copy (clone(), or inplace=False)"
_NO_HOOKS = "don't yet support saved tensor hooks"
"""What torch.func says where a recipe would be written."""
_NOT_IN_PLACE = "give what changes a new tensor (x = x + 1), or give the block a copy (clone())"


class Runner(Protocol):
    """What a block's node needs of the engine."""

    micro_batches: int
    device: torch.device
    """What blocks compute on, wherever their inputs are."""

    def sees_batch(self, n_samples: int, tensors: list[torch.Tensor]) -> None: ...
    def begin_forward(self, block: BlockRecord, *, ends_there: bool = False) -> None: ...
    def end_forward(self, block: BlockRecord) -> None: ...
    def refuse_unless_open(self) -> None: ...
    def begin_backward(self, block: BlockRecord) -> None: ...
    def last_backward(self, block: BlockRecord) -> None: ...
    def end_backward(self, block: BlockRecord) -> None: ...
    def computing(self, kind: str, block: BlockRecord) -> AbstractContextManager[object]: ...
    def tiers_of_saved(self, block: BlockRecord, recipe: Recipe) -> dict[int, Tier]: ...
    def input_tier(self, block: BlockRecord) -> Tier | None: ...
    def given_tensors(self, block: BlockRecord) -> list[torch.Tensor]: ...
    @property
    def activations(self) -> ActivationStore: ...
    @property
    def keeps_graph(self) -> bool: ...
    @property
    def uses_recipes(self) -> bool: ...


@dataclass(eq=False)
class Call:
    """One call of a block, taken apart; shared between forward and backward."""

    forward: Callable[..., Any]
    block: BlockRecord
    state: ForwardState
    runner: Runner
    leaves: list[Any]
    spec: pytree.TreeSpec
    tensor_positions: list[int]
    n_samples: int
    ranges: list[tuple[int, int]]
    surroundings: surroundings.Surroundings
    differentiated: tuple[bool, ...]
    trained: tuple[bool, ...]
    """Of the tensors at `tensor_positions`, and of the block's parameters: whether they have gradients."""
    random_states: list[Any] = field(default_factory=list)
    """Per micro-batch, as the next one."""
    seen: list[Seen] = field(default_factory=list)
    out_spec: pytree.TreeSpec | None = None
    constants: list[Any] = field(default_factory=list)
    captured_keys: tuple[str, ...] = ()
    n_captured: int = 0
    """The last results, which the model collects beside the block's return value (model/captured.py)."""
    kept: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=list)
    """Per micro-batch: inputs and outputs of a graph that was kept whole."""
    saved: list[dict[int, list[Activation | torch.Tensor]]] = field(default_factory=list)
    """Per micro-batch: results of operations that were kept, by operation of the recipe; small ones as they are."""
    kept_versions: list[Versions] = field(default_factory=list)
    """Per micro-batch: of those results."""
    first_results: list[Samples] = field(default_factory=list)
    """Per micro-batch, where the block has not run again yet."""


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast keeps the low-precision copy of every weight until its context ends: the whole model in the end,
    outdated after an update. A block's weights are used once a pass, so nothing is gained by it either."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _is_differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _run_micro(call: Call, leaves: list[Any]) -> list[Any]:
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    with _without_autocast_cache(), captured.apart(call.captured_keys) as collected:
        returned = call.forward(*args, **kwargs)
    if not call.block.checked or any(isinstance(x, list | dict) for x in (*args, *kwargs.values())):
        opaque.refuse_new_leaf(call.block.name, leaves, pytree.tree_leaves((args, kwargs)))
    out_leaves, call.out_spec = pytree.tree_flatten((returned, collected))
    call.n_captured = sum(map(len, collected.values()))
    return out_leaves


def _join_outputs(call: Call, outputs: list[list[Any]]) -> tuple[torch.Tensor, ...]:
    sizes = [stop - start for start, stop in call.ranges]
    joined: list[torch.Tensor] = []
    call.constants = []
    n_returned = len(outputs[0]) - call.n_captured
    for position, parts in enumerate(zip(*outputs, strict=True)):
        if isinstance(parts[0], torch.Tensor):
            call.constants.append(None)
            joined.append(microbatch.join(list(parts), sizes, may_be_flat=position >= n_returned))
        else:
            microbatch.check_constant(list(parts))
            call.constants.append((parts[0],))
    return tuple(joined)


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, _anchor: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        runner, block, around = call.runner, call.block, call.surroundings
        leaves = list(call.leaves)
        for position, tensor in zip(call.tensor_positions, tensors, strict=True):
            leaves[position] = tensor
        objects = opaque.opaque(leaves)
        before = [*tensors, *opaque.given_in(block.name, objects, call.n_samples, len(call.ranges))]
        runner.begin_forward(block)
        outputs: list[list[Any]] = []
        given = Versions([] if runner.keeps_graph else tensors)
        parameters = call.state.parameters.look()
        try:
            for start, stop in call.ranges:
                micro = microbatch.slice_leaves(leaves, call.n_samples, start, stop)
                with runner.computing("forward", block):
                    if runner.keeps_graph:
                        outputs.append(_forward_keeping(call, micro))
                    else:
                        call.random_states.append(global_states(runner.device))
                        call.seen.append(call.state.look(around.training, around.hooks, objects))
                        outputs.append(_forward_saving(call, micro))
                        call.state.ran(call.seen[-1])
                        call.first_results.append(Samples([] if block.recomputed else outputs[-1]))
                given.check(block.name, "by the block itself", _COPY)
                call.state.parameters.ran(parameters)
                opaque.refuse_new_in(block.name, "returns", opaque.opaque(outputs[-1]), [*before, *micro])
                opaque.refuse_new_in(block.name, "writes to", objects, before)
            block.checked = True
        finally:
            runner.end_forward(block)
        block.awaiting_backward.add(call)
        ctx.given = given
        _save_inputs(ctx, call, tensors)
        call.leaves = [None if isinstance(x, torch.Tensor) else x for x in call.leaves]
        ctx.call, ctx.block_name, ctx.trains = call, block.name, block.trains
        results = _join_outputs(call, outputs)
        ctx.mark_non_differentiable(*[r for r in results if not _is_differentiable(r)])
        ctx.set_materialize_grads(False)
        # An input that is returned as it is would alias the node's input; autograd wants its own tensor.
        inputs = {id(t) for t in tensors}
        return tuple(r.view_as(r) if id(r) in inputs else r for r in results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        call: Call = ctx.call
        other_backwards.refuse(ctx)
        runner, block = call.runner, call.block
        runner.refuse_unless_open()
        ctx.given.check(block.name, "between its forward and backward", _NOT_IN_PLACE)
        tensors = ctx.shapes if call.kept else block_inputs.restore(ctx)
        leaves = list(call.leaves)
        for position, tensor in zip(call.tensor_positions, tensors, strict=True):
            leaves[position] = tensor
        grads: list[torch.Tensor | None] = [None] * len(tensors)
        runner.begin_backward(block)
        try:
            for number in reversed(range(len(call.ranges))):  # the last is still the nearest
                with _as_it_was(call, number) as now:
                    if call.kept:
                        inputs, outputs = call.kept[number]
                    else:
                        micro = microbatch.slice_leaves(leaves, call.n_samples, *call.ranges[number])
                        with runner.computing("recompute", block):
                            inputs, outputs = _run_again(call, micro, number, now)
                    if number == 0:
                        block.awaiting_backward.discard(call)
                        runner.last_backward(block)
                    with runner.computing("backward", block):
                        _backward_micro(call, inputs, outputs, grad_outputs, number)
                if call.kept:
                    call.kept[number] = ([], [])
                for i, tensor in enumerate(inputs):
                    if tensor.grad is None or not ctx.needs_input_grad[2 + i]:
                        continue
                    grads[i] = _place(grads[i], tensor.grad, tensors[i], call, number)
                    tensor.grad = None
            runner.activations.left_block()
        finally:
            block.awaiting_backward.discard(call)
            runner.end_backward(block)
        ctx.call = None
        return (None, None, *grads)


@contextmanager
def _as_it_was(call: Call, number: int) -> Iterator[Now | None]:
    """Afterwards, whatever came in between, the block's state is as it was `now`."""
    if call.kept:
        yield None
        return
    now = call.state.now(call.seen[number])
    try:
        yield now
    finally:
        call.state.left(call.seen[number], now)


def _run_again(
    call: Call, micro: list[Any], number: int, now: Now | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The block's graph, as its first run would have made it, and nothing else that has changed by it: what hooks draw
    and change during backward comes after what there is `now`."""
    device = call.runner.device
    before, outside = call.random_states[number], global_states(device)
    try:
        as_then = call.state.parameters.as_trained(call.trained)
        with surroundings.again(call.surroundings, call.state.modules, device), as_then:
            inputs, outputs = _recompute(call, micro, number, outside, now)
        if not call.block.recomputed:
            opaque.tell_of_left_behind(call.state.modules)
    finally:
        put_global_states(outside, device, before)
    if now is not None:
        call.state.ran_again(call.seen[number], now)
    call.block.recomputed = True
    return inputs, outputs


def _forward_keeping(call: Call, micro: list[Any]) -> list[Any]:
    with torch.enable_grad(), saved_by_reference(call.block):
        inputs = _detach_inputs(call, micro)
        try:
            out_leaves = _run_micro(call, micro)
        except RuntimeError as error:
            if _NO_HOOKS not in str(error):
                raise
            raise UsageError(
                f"block {call.block.name} uses torch.func, of which no graph can be kept: leave activations='keep' out"
            ) from error
    outputs = [x for x in out_leaves if isinstance(x, torch.Tensor)]
    call.kept.append((inputs, outputs))
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in out_leaves]


def _detach_inputs(call: Call, micro: list[Any]) -> list[torch.Tensor]:
    inputs = []
    for position in call.tensor_positions:
        source = micro[position]
        tensor = source.detach().requires_grad_(source.requires_grad)
        micro[position] = tensor
        inputs.append(tensor)
    return inputs


def _module(call: Call) -> nn.Module | None:
    """The block's, unless somebody has put another forward in its place."""
    module = getattr(call.forward, "__self__", None)
    return module if isinstance(module, nn.Module) else None


def _signature(call: Call, micro: list[Any]) -> tuple[Any, ...]:
    """What decides which operations a block does, and which of their results backward needs, as far as we know."""
    shapes = tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in micro
    )
    return shapes, call.differentiated, call.trained, call.surroundings.key


def _forward_saving(call: Call, micro: list[Any]) -> list[Any]:
    """Forward without a graph; results of operations that the policy names are put away for recomputation."""
    call.saved.append({})
    call.kept_versions.append(Versions([]))
    recipe = call.block.recipes.get(_signature(call, micro))
    if recipe is None or recipe.why_not or not call.runner.uses_recipes:
        return _run_micro(call, micro)
    tiers = call.runner.tiers_of_saved(call.block, recipe)
    if not tiers:
        return _run_micro(call, micro)
    keeper = Keeper(recipe, frozenset(tiers))
    with following(keeper, _module(call)):
        out_leaves = _run_micro(call, micro)
    if keeper.matches:
        call.kept_versions[-1] = Versions([t for tensors in keeper.kept.values() for t in tensors])
        call.runner.activations.order_after_left()
        for op, tensors in keeper.kept.items():
            held = _put_away(call, tensors, tiers[op])
            if held is not None:
                call.saved[-1][op] = held
    return out_leaves


def _put_away(call: Call, tensors: list[torch.Tensor], tier: Tier) -> list[Activation | torch.Tensor] | None:
    """All results of one operation, or None where `tier` has no room for them: then they are recomputed."""
    store = call.runner.activations
    held: list[Activation | torch.Tensor] = []
    for tensor in tensors:
        if tensor.untyped_storage().nbytes() <= SMALL_NBYTES:
            held.append(tensor.detach())
            continue
        activation = store.swap_out_where_room(tensor.detach(), tier, call.block.label)
        if activation is None:
            return None
        held.append(activation)
    return held


def _recompute(
    call: Call, micro: list[Any], number: int, outside: list[Any], now: Now | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The block's graph again, from its inputs and what was kept. See [Note: recipe] in recipe.py."""
    signature = _signature(call, micro)
    recipe = call.block.recipes.get(signature)
    store = call.runner.activations
    held = call.saved[number]
    call.kept_versions[number].check(call.block.name, "though it is one of its results", _NOT_IN_PLACE)
    away = [a for results in held.values() for a in results if isinstance(a, Activation)]
    tensors = iter(store.swap_in(away) if away else [])
    saved = {
        op: [next(tensors) if isinstance(a, Activation) else a for a in results]
        for op, results in held.items()
    }
    call.saved[number] = {}
    is_whole = True
    with torch.enable_grad():
        put_global_states(call.random_states[number], call.runner.device, outside)
        call.state.put(call.seen[number], now)
        inputs = _detach_inputs(call, micro)
        if not call.runner.uses_recipes:
            out_leaves = _run_micro(call, micro)
        elif recipe is None:
            found = call.seen[number].all_tensors()
            recorder = Recorder([*inputs, *found, *call.runner.given_tensors(call.block)])
            try:
                with recording(recorder, _module(call)):
                    out_leaves = _run_micro(call, micro)
            except RuntimeError as error:
                if _NO_HOOKS not in str(error):
                    raise
                call.block.recipes[signature] = Recipe(
                    [], [], why_not="it uses torch.func, which lets nobody look"
                )
                return _recompute(call, micro, number, [None] * 4, None)
            made = [x for x in out_leaves if isinstance(x, torch.Tensor)]
            unseen.in_graph(made, recorder.read, recorder.cannot)
            call.block.recipes[signature] = recorder.recipe()
        elif not recipe.why_not and recipe.first_changed(frozenset(saved)) is not None:
            try:
                is_whole = False
                with following(Replayer(recipe, saved), _module(call)):
                    out_leaves = _run_micro(call, micro)
            except Departed:
                recipe.why_not = "it does not do the same operations every time"
                return _recompute(call, micro, number, [None] * 4, None)
        else:
            out_leaves = _run_micro(call, micro)
    outputs = [x for x in out_leaves if isinstance(x, torch.Tensor)]
    if is_whole and call.first_results[number]:
        call.first_results[number].check(call.block.name, outputs)
    return inputs, outputs


def _backward_micro(
    call: Call,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    grad_outputs: tuple[torch.Tensor | None, ...],
    number: int,
) -> None:
    start, stop = call.ranges[number]
    whole = len(call.ranges) == 1
    rows = [1 if grad is None or whole else grad.shape[0] // call.n_samples for grad in grad_outputs]
    pairs = [
        (output, grad if whole else grad[start * n : stop * n])
        for output, grad, n in zip(outputs, grad_outputs, rows, strict=True)
        if grad is not None and output.requires_grad
    ]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


def _place(
    total: torch.Tensor | None, grad: torch.Tensor, tensor: torch.Tensor, call: Call, number: int
) -> torch.Tensor:
    """Put one micro-batch's input gradient into the whole: its rows for a batched input, a sum for a shared one."""
    if len(call.ranges) == 1:
        return grad
    start, stop = call.ranges[number]
    if microbatch.is_batched(tensor, call.n_samples):
        if total is None:
            total = grad.new_empty(tensor.shape)
        total[start:stop].copy_(grad)
        return total
    return grad if total is None else total.add_(grad)


def _save_inputs(ctx: Any, call: Call, tensors: tuple[torch.Tensor, ...]) -> None:
    if call.kept:  # the graph has them
        ctx.shapes = [torch.empty(t.shape, device="meta") for t in tensors]
        return
    runner, block = call.runner, call.block
    block_inputs.save(ctx, tensors, runner.activations, runner.input_tier(block), block.label)


def run_block(
    block: BlockRecord,
    state: ForwardState,
    runner: Runner,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a block's `forward`; with gradients as one autograd node, without them directly."""
    if not torch.is_grad_enabled():
        runner.begin_forward(block, ends_there=True)
        try:
            with _without_autocast_cache():
                return forward(*args, **kwargs)
        finally:
            runner.end_forward(block)
    leaves, spec = microbatch.flatten(args, kwargs)
    leaves = captured.without_cache(block.name, leaves)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    n_samples = microbatch.batch_numel(leaves)
    runner.sees_batch(n_samples, [leaves[i] for i in positions])
    ranges = microbatch.cut_points(n_samples, runner.micro_batches)
    if len(ranges) > 1:
        microbatch.check_unambiguous(leaves, n_samples)
    around = surroundings.now(state.modules, runner.device)
    tensors = [leaves[i] for i in positions]
    wanted, trained = tuple([tensor.requires_grad for tensor in tensors]), state.parameters.trained()
    cut = n_samples, ranges
    call = Call(forward, block, state, runner, leaves, spec, positions, *cut, around, wanted, trained)
    call.captured_keys = captured.wanted_keys()
    # Blocks are trained even when their input needs no gradient (a frozen embedding): the anchor keeps the node.
    anchor = torch.empty(0, requires_grad=block.trains, device="cpu")
    results = iter(_BlockFunction.apply(call, anchor, *tensors))
    if call.out_spec is None:
        raise UsageError(f"block {block.name} returned nothing")
    out_leaves = [next(results) if constant is None else constant[0] for constant in call.constants]
    returned, collected = pytree.tree_unflatten(out_leaves, call.out_spec)
    captured.hand_on(collected)
    return returned

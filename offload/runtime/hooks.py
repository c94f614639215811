"""The engine's hooks on nn.Module and autograd: they decide nothing, and call one method of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import nn

from offload.model.blocks import base_of
from offload.stores.block_store import BlockRecord

logger = logging.getLogger("offload")


_uncompiled: Callable[..., Any] = torch._disable_dynamo  # type: ignore[attr-defined]
"""What the engine does is no arithmetic: torch.compile of what is around it is not to look into it. (The public name,
torch.compiler.disable, would import the compiler at once.)"""


def replace_forward(
    module: nn.Module,
    run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
    compile_with: bool | str = False,
) -> None:
    """Let `run(original_forward, args, kwargs)` stand in for `module.forward`.

    `compile_with`: True, or the name of a backend of torch.compile: in training the original is compiled. The stand-in
    stays outside of what is compiled, and parameters are inputs of it, so their memory may change.
    """
    original = trained = module.forward
    if compile_with:
        trained = torch.compile(module.forward, backend="inductor" if compile_with is True else compile_with)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(trained if torch.is_grad_enabled() else original, args, kwargs)

    module.forward = _uncompiled(forward)


def restore_forward(module: nn.Module) -> None:
    """Undo `replace_forward`."""
    module.__dict__.pop("forward", None)


@contextlib.contextmanager
def own_forward(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, `replace_forward` of these modules is undone."""
    replaced = [(module, module.__dict__.pop("forward", None)) for module in modules]
    try:
        yield
    finally:
        for module, forward in replaced:
            if forward is not None:
                module.forward = forward


def on_gradient(
    block: BlockRecord, receive: Callable[[BlockRecord, Any, int, nn.Parameter], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call the method `receive(block, buffer, position, parameter)` when a trainable parameter has its gradient.

    Hooks of a parameter are kept by C++, where Python's collector sees no cycle: they hold nothing strongly that leads
    back to the parameter, or a model that is forgotten without `close` would stay for ever, with its store.
    """
    receive_ref, block_ref = weakref.WeakMethod(receive), weakref.ref(block)
    handles = []
    for index, buffer in enumerate(block.layout.buffers):
        if not buffer.trainable:
            continue
        for position, segment in enumerate(buffer.segments):

            def hook(parameter: torch.Tensor, index: int = index, position: int = position) -> None:
                method, owner = receive_ref(), block_ref()
                if method is not None and owner is not None:
                    leaf = cast(nn.Parameter, parameter)
                    method(owner, owner.layout.buffers[index], position, leaf)

            handles.append(segment.parameter.register_post_accumulate_grad_hook(hook))
    return handles


_CACHED = "_offload_used_cache"
"""Attribute of a model whose cache is off meanwhile. Not of its configuration, which would write it to its file."""


def stop_caching(model: nn.Module) -> Callable[[], None]:
    """Turn the cache of a Hugging Face model off, which would grow twice when a block recomputes; what is returned
    turns it on again if it was."""
    config: Any = getattr(model, "config", None)
    was_on = bool(getattr(config, "use_cache", False))
    if was_on:
        config.use_cache = False
        base_of(model).__dict__[_CACHED] = True

    def cache_again() -> None:
        if base_of(model).__dict__.pop(_CACHED, False):
            config.use_cache = True

    return cache_again


def cache_is_stopped(model: nn.Module) -> bool:
    """Whether `stop_caching` has turned off the cache of `model`, or of what adapters were put into."""
    return _CACHED in base_of(model).__dict__


_TURN_OFF = (
    "activation_checkpointing_disable",
    "gradient_checkpointing_disable",
    "disable_gradient_checkpointing",
)
"""Of transformers 5, of its older versions and of diffusers."""


def stop_checkpointing(model: nn.Module) -> Callable[[], None]:
    """Turn the gradient checkpointing of a model of transformers or diffusers off, since blocks recompute by
    themselves; what is returned turns it on again as it was."""
    on = [
        (module, getattr(module, "_gradient_checkpointing_func", None))
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    if on:
        turn_off = next(
            (found for name in _TURN_OFF if (found := getattr(model, name, None)) is not None), None
        )
        if turn_off is not None:  # it may undo more than the flags say
            turn_off()
        for module, _ in on:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        logger.info(
            "gradient checkpointing of the model is off while blocks are streamed: they recompute by themselves"
        )

    def checkpoint_again() -> None:
        for module, function in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]
            module._gradient_checkpointing_func = function  # type: ignore[assignment]

    return checkpoint_again


class _Before:
    """Calls back; a copied module shares it, and pickling it is left to who is called."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    @_uncompiled
    def __call__(self, module: nn.Module, args: Any) -> None:
        self._call()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Before:
        return self


def before_forward(
    modules: list[nn.Module], call: Callable[[], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `call()` before each of `modules` runs."""
    return [module.register_forward_pre_hook(_Before(call)) for module in modules]


class StateOwner(Protocol):
    """Who knows the values of parameters that are not where a module looks for them."""

    def begin(self, module: nn.Module, prefix: str, keep_vars: bool) -> None: ...
    def fill(self, module: nn.Module, destination: dict[str, Any], prefix: str, metadata: Any) -> None: ...
    def begin_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None: ...


def on_state_dict(model: nn.Module, owner: StateOwner) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `owner.begin` before every module of `model` says its state, and `owner.fill` for its own parameters.

    `fill` comes before hooks of the user's, which then see real values. `owner.begin_load` comes before any module is
    given state.
    """
    handles = []
    for module in model.modules():
        handles.append(module.register_state_dict_pre_hook(functools.partial(owner.begin)))
        fill = module.register_state_dict_post_hook(functools.partial(owner.fill))
        cast(Any, module._state_dict_hooks).move_to_end(fill.id, last=False)
        handles.append(fill)
        handles.append(module.register_load_state_dict_pre_hook(functools.partial(owner.begin_load)))
    return handles


def without_state_hooks(module: nn.Module) -> dict[int, Any]:
    """What to give to copy.deepcopy as its memo, so that a copy of `module` has its state to itself."""
    owned = [
        hooks
        for m in module.modules()
        for hooks in (m._state_dict_pre_hooks, m._state_dict_hooks, m._load_state_dict_pre_hooks)
    ]
    return {id(hooks): OrderedDict() for hooks in owned}


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Run `call` when the autograd pass that is running now has finished. Only valid inside a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(call)

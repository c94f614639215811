"""The only file that touches nn.Module and autograd hooks. Hooks decide nothing; they call one engine method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload.stores.block_store import BlockRecord


def replace_forward(
    module: nn.Module, run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
) -> None:
    """Let `run(original_forward, args, kwargs)` stand in for `module.forward`."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(original, args, kwargs)

    module.forward = forward


def restore_forward(module: nn.Module) -> None:
    """Undo `replace_forward`."""
    module.__dict__.pop("forward", None)


def on_gradient(
    block: BlockRecord, receive: Callable[[BlockRecord, Any, int, nn.Parameter], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `receive(block, buffer, position, parameter)` whenever a trainable parameter has accumulated a gradient."""
    handles = []
    for buffer in block.layout.buffers:
        if not buffer.trainable:
            continue
        for position, segment in enumerate(buffer.segments):

            def hook(parameter: torch.Tensor, buffer: Any = buffer, position: int = position) -> None:
                receive(block, buffer, position, parameter)  # type: ignore[arg-type]  # leaves are Parameters

            handles.append(segment.parameter.register_post_accumulate_grad_hook(hook))
    return handles


def before_forward(
    modules: list[nn.Module], call: Callable[[], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `call()` before each of `modules` runs."""
    return [module.register_forward_pre_hook(lambda _module, _args: call()) for module in modules]


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Run `call` when the autograd pass that is running now has finished. Only valid inside a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(call)

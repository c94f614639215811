"""Backwards through a block that would not give torch's results."""

from __future__ import annotations

from typing import Any

import torch

from offload.errors import UsageError


def refuse(ctx: Any) -> None:
    """Raise UsageError for a backward whose results would not be torch's: a node gives its gradients once, none of
    them can be differentiated again, and its parameters' go to the engine whoever asks."""
    if ctx.call is None:
        raise UsageError(
            f"backward came to block {ctx.block_name} again through the same graph (retain_graph=True), and what the "
            "block kept for it is gone: add the losses up and call backward once, or run forward again, all backwards "
            "of a step but the last under `with model.offload.no_sync():`"
        )
    if ctx.call in ctx.call.block.outdated:
        raise UsageError(
            f"backward came to block {ctx.block_name} after an optimizer.step() that has updated its parameters since "
            "this graph's forward, of which its gradients would not be: call backward for all losses before step(), "
            "or run forward again"
        )
    if torch.is_grad_enabled():
        raise UsageError(
            f"block {ctx.block_name}: its gradients cannot be differentiated again, as create_graph=True asks for; "
            "step_aside='always' streams nothing and can"
        )
    if ctx.trains and not torch._C._will_engine_execute_node(ctx.next_functions[0][0]):
        raise UsageError(
            f"torch.autograd.grad, or backward(inputs=...), goes through block {ctx.block_name}, whose parameters "
            "would be trained by it though nobody asked for their gradients: call backward(), and take the gradient of "
            "another tensor in its register_hook or, of a leaf, from .grad; step_aside='always' streams nothing and can"
        )

"""A block's inputs between forward and backward: kept where there is room, as they were, or missed by name.

[Note: inputs that change] A block runs again from its inputs, so they must be what they were. One that is changed in
place shows it by its version, which a tensor without memory shares with it: so this is noticed also of inputs that
have left the device, and wherever they wait, the outcome is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from offload.errors import UsageError
from offload.stores.activations import ActivationStore, Tier

_EMPTY: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def version(tensor: torch.Tensor) -> int:
    """How often it was changed in place, by what autograd sees."""
    return 0 if tensor.is_inference() else tensor._version


class Versions:
    """Of some tensors, without holding their memory. See [Note: inputs that change]."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        self._probes = [_without_memory(tensor) for tensor in tensors]
        self._versions = [version(probe) for probe in self._probes]

    def check(self, block_name: str, when: str, remedy: str) -> None:
        """Raise UsageError where one of the tensors has been changed in place."""
        for number, (probe, before) in enumerate(zip(self._probes, self._versions, strict=True)):
            if version(probe) != before:
                raise UsageError(
                    f"block {block_name}: a tensor that it was given (number {number}, of shape "
                    f"{self._shapes[number]}) was changed in place {when}. The block runs again in backward and would "
                    f"start from other values: {remedy}"
                )


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    probe = tensor.detach()
    if type(probe) is not torch.Tensor or probe.layout is not torch.strided or probe.is_inference():
        return probe
    key = (probe.dtype, probe.device)
    if key not in _EMPTY:
        _EMPTY[key] = torch.empty(0, dtype=probe.dtype, device=probe.device)
    probe.data = _EMPTY[key]
    return probe


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The same values without memory between them; strides stay where they leave no gaps."""
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return tensor.contiguous()


def strided_as(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The same values at these strides, as the block saw them the first time: a kernel may add up in another order by
    them. Contiguous where they let elements overlap otherwise than by an expanded dimension."""
    if tensor.stride() == stride or not tensor.numel():
        return tensor
    compact = tensor
    for dim, step in enumerate(stride):
        if step == 0:
            compact = compact.narrow(dim, 0, 1)
    spread = torch.empty_strided(compact.shape, stride, dtype=tensor.dtype, device=tensor.device)
    if torch._debug_has_internal_overlap(spread) == 1:
        return tensor
    try:
        return spread.copy_(compact).expand(tensor.shape)
    except RuntimeError:  # they overlap in a way that is hard to see
        return tensor


def save(
    ctx: Any, tensors: Sequence[torch.Tensor], store: ActivationStore, tier: Tier | None, label: str
) -> None:
    """Keep the inputs of a node; the largest (the hidden states) in `tier`, or the first that has room for it."""
    kept = list(tensors)
    ctx.swapped = None
    if tensors:
        largest = max(range(len(tensors)), key=lambda i: tensors[i].numel() * tensors[i].element_size())
        given = tensors[largest].detach()
        tensor = dense(given)
        if tier is not None and not store.has_room(tensor.numel() * tensor.element_size(), tier):
            tier = None
        store.order_after_left(but_of=label)
        ctx.swapped = (largest, store, store.swap_out(tensor, tier, label), given.stride())
        kept[largest] = tensors[largest].new_empty(0)
    ctx.save_for_backward(*kept)
    ctx.requires = [tensor.requires_grad for tensor in tensors]


def restore(ctx: Any) -> list[torch.Tensor]:
    """What `save` has kept, each a leaf of its own."""
    tensors = list(ctx.saved_tensors)
    if ctx.swapped is not None:
        largest, store, activation, stride = ctx.swapped
        (tensors[largest],) = store.swap_in([activation])
        tensors[largest] = strided_as(tensors[largest], stride)
    return [t.detach().requires_grad_(r) for t, r in zip(tensors, ctx.requires, strict=True)]

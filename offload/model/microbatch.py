"""Cutting a block's call into micro-batches along the batch dimension, and putting the results together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.utils import _pytree as pytree

from offload.errors import UsageError


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves of a call and how to rebuild it."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return leaves, spec


def batch_numel(leaves: list[Any]) -> int:
    """First dimension of the first tensor with two or more dimensions; 1 when there is none."""
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2:
            return leaf.shape[0]
    return 1


def cut_points(n_samples: int, n_micro: int) -> list[tuple[int, int]]:
    """At most `n_micro` nearly equal (start, stop) ranges that cover `n_samples`."""
    n_micro = max(1, min(n_micro, n_samples))
    edges = [n_samples * i // n_micro for i in range(n_micro + 1)]
    return list(pairwise(edges))


def check_unambiguous(leaves: list[Any], n_samples: int) -> None:
    """Refuse a call in which a low-dimensional tensor's first dimension may or may not be the batch."""
    hidden = next((x for x in leaves if isinstance(x, torch.Tensor) and x.dim() >= 2), None)
    if hidden is None or hidden.dim() < 3 or hidden.shape[1] != n_samples:
        return
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.dim() <= 2 and leaf.shape[:1] == (n_samples,):
            raise UsageError(
                f"micro-batches: batch and sequence are both {n_samples} long, so a tensor of shape "
                f"{tuple(leaf.shape)} cannot be cut safely; change the batch size or use micro_batches=1"
            )


def is_batched(leaf: Any, n_samples: int) -> bool:
    """Whether `leaf` is a tensor whose first dimension is the batch."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() >= 1 and leaf.shape[0] == n_samples


def slice_leaves(leaves: list[Any], n_samples: int, start: int, stop: int) -> list[Any]:
    """The leaves of one micro-batch; tensors that are not batched are shared."""
    if (start, stop) == (0, n_samples):
        return list(leaves)
    return [leaf[start:stop] if is_batched(leaf, n_samples) else leaf for leaf in leaves]


def check_constant(parts: list[Any]) -> None:
    """Refuse a number or text that a block returns, when it is not the same for all micro-batches."""
    for part in parts[1:]:
        if isinstance(part, (int, float, str)) and part != parts[0] and part == part:  # not NaN
            raise UsageError(
                f"micro-batches: a block returned {parts[0]!r} for one and {part!r} for another, and there is one "
                "value for all: return a tensor of the batch, or use micro_batches=1 for this model"
            )


def join(parts: list[torch.Tensor], sizes: list[int], *, may_be_flat: bool = False) -> torch.Tensor:
    """Put micro-batch outputs together along the batch; `may_be_flat`: its dimension may be one with the next ones.

    Raises UsageError for an output without a batch dimension.
    """
    if len(parts) == 1:
        return parts[0]
    rows = parts[0].shape[0] // sizes[0] if may_be_flat and parts[0].dim() else 1
    if any(p.dim() == 0 or p.shape[0] != rows * n for p, n in zip(parts, sizes, strict=True)):
        raise UsageError(
            f"micro-batches: a block returned a tensor of shape {tuple(parts[0].shape)}, whose first dimension is "
            "not the batch; use micro_batches=1 for this model"
        )
    return torch.cat(parts)

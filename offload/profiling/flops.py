"""FLOPs of one operation and the kind they count under. A multiply-add is two; only products count.

[Note: kinds] An operation is sorted by what it does, not by the module it stands in: `linear` multiplies with a
parameter (dense or grouped by expert), `attention` is a fused scaled dot product, `matmul` any other product of two
activations (attention written out, for one), `convolution` the rest. Element-wise work counts as nothing: it is bound
by memory and is a thousandth of the products in models of this size. A causal mask does not halve attention: the
convention of the published tables (4 * heads * head size * tokens^2 a sequence).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

LINEAR, ATTENTION, MATMUL, CONVOLUTION = "linear", "attention", "matmul", "convolution"


def attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Both products: query (..., heads, tokens, head size); key and value may have fewer heads (grouped queries)."""
    *heads, tokens, width = query.shape
    return 2 * math.prod(heads) * tokens * key.shape[-2] * (width + value.shape[-1])


def grouped_flops(rows: torch.Tensor, weights: torch.Tensor) -> int:
    """Every row meets the matrix of its own group, or (both 2-dimensional) every group has its own columns."""
    if rows.dim() == 3:
        return 2 * math.prod(rows.shape) * weights.shape[-1]
    return 2 * rows.shape[0] * rows.shape[1] * weights.shape[-1]


def count(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[str, int]:
    """(kind, FLOPs) of one dispatched operation; ("", 0) where nothing counts. `linear` is told apart by the caller."""
    packet = operator._overloadpacket
    name = packet.__name__
    if "attention" in name and "backward" not in name:
        return ATTENTION, attention_flops(*args[:3])
    if "grouped_mm" in name and "backward" not in name:
        return MATMUL, grouped_flops(*args[:2])
    if packet is torch.ops.aten.mv or packet is torch.ops.aten.dot:
        return MATMUL, 2 * args[0].numel()
    formula = flop_registry.get(packet)
    if formula is None:
        return "", 0
    kind = CONVOLUTION if "convolution" in name or "conv2d" in name else MATMUL
    return kind, int(formula(*args, **kwargs, out_val=result))

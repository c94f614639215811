"""Products of matrices added to an fp32 sum that stays where it is.

[Note: products of narrow matrices] On a device of its own the operands are bf16 or fp16, and `addmm` with `out_dtype`
adds their product to the sum in one kernel: it never exists by itself, and nothing is rounded to the narrow dtype.
Elsewhere the product is a matrix as large as the sum: rounded, with two bytes an element to write and two to read, and
the sum's eight are read and written by a kernel of their own, where no product hides them.
`out_dtype` came with torch 2.8 for CUDA, and sums in fp32 are taken with it since late 2025
(github.com/pytorch/pytorch/pull/167931); what a build does with both is tried once.
"""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger("offload")


def add_outer(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (V, H, fp32, contiguous) += leftᵀ (V, T) @ right (T, H), in fp32 where `left` is. Otherwise both are of one
    narrower dtype. See [Note: products of narrow matrices]."""
    if left.dtype == torch.float32:
        total.addmm_(left.t(), right.float())
    elif _adds_in_fp32(right.device, right.dtype):
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        total += left.t() @ right


@functools.cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` there adds a product of `dtype` to an fp32 sum in place without rounding it. The first call waits
    for the device."""
    left = torch.ones(16, 16, dtype=dtype, device=device)
    right = left.clone()
    right[0] = 2.0**-12  # products are 15 + 2**-12: 16 significant bits, more than bf16 or fp16 has
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
        found = bool((total == 16 + 2.0**-12).all())
    except (RuntimeError, TypeError) as error:  # no such kernel, or no such argument
        logger.debug("addmm with out_dtype on %s: %s", device, error)
        found = False
    if not found:
        logger.info(
            "torch %s does not add products of %s to a sum in fp32 on %s: the loss in chunks rounds its share of the "
            "head's gradient chunk by chunk, and is slower",
            torch.__version__,
            str(dtype).removeprefix("torch."),
            device,
        )
    return found

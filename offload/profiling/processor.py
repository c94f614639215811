"""What this machine's processor can and cannot multiply at speed."""

from __future__ import annotations

import torch


def has_bfloat16_products() -> bool:
    """Whether torch multiplies bf16 matrices with instructions of the processor made for it (AVX-512 or AMX).

    Without, each number is converted on its own: tens of times slower than fp32.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN: it cannot say
        return True

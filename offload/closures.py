"""What `optimizer.step(closure)` does with its closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, computed with gradients on inside `torch.no_grad`; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()

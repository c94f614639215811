"""A block's first recomputation, compared with its first run: what the library cannot see shows there.

A block may depend on something that neither its arguments nor its modules nor a generator that is known tell of (a
clock, a file, whether gradients are enabled). Its gradients would be those of another function, without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from offload.errors import UsageError

_N_SAMPLES = 1024
"""Elements of each result that are compared."""


class Samples:
    """Some elements of what a block has returned."""

    def __init__(self, results: Sequence[Any]) -> None:
        tensors = [x for x in results if isinstance(x, torch.Tensor)]
        self._shapes = [tuple(t.shape) for t in tensors]
        self._samples = [_sample(t) for t in tensors]

    def __bool__(self) -> bool:
        return bool(self._samples)

    def check(self, block_name: str, results: Sequence[torch.Tensor]) -> None:
        """Raise UsageError where the block has returned something else now, by more than the order of sums explains."""
        same = self._shapes == [tuple(t.shape) for t in results]
        if not same or not all(_near(a, _sample(b)) for a, b in zip(self._samples, results, strict=True)):
            raise UsageError(
                f"block {block_name} has not returned in backward, where it runs again, what it returned in forward: "
                "it depends on something that is none of its arguments, attributes and buffers, nor a generator of "
                "random numbers that it holds (a clock, a file, an iterator, whether gradients are enabled). Let it "
                "hold that, or keep the graph, with activations='keep'"
            )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _N_SAMPLES)].clone()


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point() or a.dtype != b.dtype:
        return torch.equal(a, b)
    if a.numel() == 0 or torch.equal(a, b):
        return True
    x, y = a.double(), b.double()
    finite = torch.isfinite(x) & torch.isfinite(y)
    if not torch.equal(torch.isnan(x), torch.isnan(y)):
        return False
    if not bool(finite.any()):
        return True
    bound = max(1e-3, 8 * torch.finfo(a.dtype).eps) * float(x[finite].abs().max())
    return float((x - y)[finite].abs().max()) <= bound

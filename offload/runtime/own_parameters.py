"""Parameters that a block's forward changes by itself, past the optimizer: such a change would be lost.

A block's parameters are computed with where they have been fetched to, and are gone from there when it gives its memory
to another. What changes them has to be the update.
"""

from __future__ import annotations

import torch
from torch import nn

from offload.errors import UsageError

_State = tuple[int, int, torch.Tensor | None]


class OwnParameters:
    """Looks whether one block's forward leaves its parameters alone: by version and memory, and by their sums when it
    runs first, because `.data` hides a change in place."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._parameters = [(n, p) for n, p in module.named_parameters() if p.is_floating_point()]
        self._has_run = False

    @torch.no_grad()
    def look(self) -> list[_State]:
        """Before forward."""
        return [(p._version, p.data_ptr(), None if self._has_run else _sum(p)) for _, p in self._parameters]

    @torch.no_grad()
    def ran(self, before: list[_State]) -> None:
        """After forward. Raises UsageError for a parameter that it has changed."""
        for (name, p), (version, address, total) in zip(self._parameters, before, strict=True):
            same = p._version == version and p.data_ptr() == address
            if not same or (total is not None and not torch.equal(_sum(p), total)):
                raise UsageError(
                    f"block {self._name}: forward changes its parameter {name}, and the change would be lost: only "
                    "updates reach a parameter's own memory. Let forward compute with a changed copy (a "
                    "parametrization of torch.nn.utils.parametrize does), or use step_aside='always', which streams "
                    "nothing"
                )
        self._has_run = True


def _sum(parameter: torch.Tensor) -> torch.Tensor:
    """Equal for equal values, NaN or not."""
    values = parameter.detach()
    if values.is_floating_point() and values.itemsize in (2, 4):
        values = values.view(torch.int32 if values.itemsize == 4 else torch.int16)
    return values.sum()

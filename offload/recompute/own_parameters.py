"""A block's own parameters: which of them are trained, and that forward does not change them past the optimizer.

Torch settles in forward which parameters a graph leads to: one that is frozen then and trained again before backward
(a critic, while what it judges is trained) gets no gradient. So what runs again is trained as it was then.

A block's parameters are computed with where they have been fetched to, and are gone from there when it gives its memory
to another; and forward runs once more in backward. What changes them has to be the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

from torch import nn

from offload.errors import UsageError

_REQUIRES_GRAD = attrgetter("requires_grad")
"""Asked in every forward and backward, so in calls that run no Python."""


class OwnParameters:
    """Looks whether one block's forward leaves its parameters alone; model/guarded.py has their versions count what is
    written through `.data` too."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._parameters = list(module.named_parameters())
        self._tensors = [parameter for _, parameter in self._parameters]

    def trained(self) -> tuple[bool, ...]:
        """Which of them have gradients now: a loop may freeze one, or train it again, between any two calls."""
        return tuple(map(_REQUIRES_GRAD, self._tensors))

    @contextmanager
    def as_trained(self, then: tuple[bool, ...]) -> Iterator[None]:
        """Inside, those are trained that were `then`."""
        changed = [p for p, was in zip(self._tensors, then, strict=True) if p.requires_grad is not was]
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)
        try:
            yield
        finally:
            for parameter in changed:
                parameter.requires_grad_(not parameter.requires_grad)

    def look(self) -> list[int]:
        """Before forward."""
        return [parameter._version for _, parameter in self._parameters]

    def ran(self, before: list[int]) -> None:
        """After forward. Raises UsageError for a parameter that it has changed."""
        for (name, parameter), version in zip(self._parameters, before, strict=True):
            if parameter._version != version:
                raise UsageError(
                    f"block {self._name}: forward changes its parameter {name}, and the change would be lost: only "
                    "updates reach a parameter's own memory. Let forward compute with a changed copy (a "
                    "parametrization of torch.nn.utils.parametrize does), or use step_aside='always', which streams "
                    "nothing"
                )

"""Which parameters steps change: those that were trainable when the model was wrapped. Others have no state here."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from offload.errors import UsageError
from offload.stores.block_store import BlockRecord


class TrainedParameters:
    """Of the blocks and the root: a parameter is `in` it when it was trainable at `offload.wrap`."""

    def __init__(self, records: Iterable[BlockRecord]) -> None:
        segments = [(b.trainable, s) for r in records for b in r.layout.buffers for s in b.segments]
        self._trained = {id(s.parameter) for trainable, s in segments if trainable}
        self._frozen = [(s.name, s.parameter) for trainable, s in segments if not trainable]

    def __contains__(self, parameter: torch.Tensor) -> bool:
        return id(parameter) in self._trained

    def refuse_unfrozen(self) -> None:
        """Raise UsageError where a parameter that has no state wants to be trained now."""
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise UsageError(
                    f"{name} was frozen when offload.wrap was called, and no step would change it: freeze it, or load "
                    "the model again and unfreeze before offload.wrap"
                )

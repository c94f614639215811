"""A run from wrap to close: what it refuses when it is over, and what can be asked of it at any time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload.errors import UsageError
from offload.runtime.assembly import Assembly
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.state_dicts import Uncopied
from offload.runtime.trained_parameters import TrainedParameters
from offload.runtime.written_parameters import WrittenParameters
from offload.stores.block_store import BlockRecord

CLOSED = (
    "the offload engine is closed, and the parameters went with it: load the model again and offload.wrap it; "
    "offload.resume then goes on from a checkpoint, or from the storage directory of a run with durability='step'. "
    "Call model.state_dict(), offload.export or offload.save before close()"
)


class OpenRun(Uncopied):
    """The part of an engine that does nothing to blocks."""

    root: BlockRecord
    blocks: list[BlockRecord]
    _assembly: Assembly
    _trained: TrainedParameters
    _written: WrittenParameters
    _optimizer: weakref.ref[OffloadOptimizer]

    def __init__(self) -> None:
        self._closed = False
        self._pid = os.getpid()
        self._undo: list[Callable[[], None]] = []

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closed

    def when_closed(self, undo: Callable[[], None]) -> None:
        """Let `close` call `undo()`."""
        self._undo.append(undo)

    def refuse_unless_open(self) -> None:
        """Raise UsageError after `close`, and in a process that was forked from the run's."""
        if self._closed:
            raise UsageError(CLOSED)
        if os.getpid() != self._pid:
            raise UsageError(
                "this process was forked from the one that trains and has neither the model's memory nor its drives: "
                "compute there, or export the model and load it here"
            )

    def refuse_what_is_lost(self) -> None:
        """Raise UsageError after `close`, and where something was done to a parameter from outside that is lost."""
        self.refuse_unless_open()
        self._written.refuse()

    def refuse_what_is_not_kept(self) -> None:
        """The same, and where the model has other parameters than those that are about to be written by their names."""
        self.refuse_what_is_lost()
        self._written.refuse_moved()

    def _hyper_of(self, parameter: nn.Parameter, start: int) -> Any:
        return self._live_optimizer().hyper_of(parameter, start)

    def _live_optimizer(self) -> OffloadOptimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise UsageError(
                "the optimizer returned by offload.wrap has been deleted, and the one given to it makes no steps: keep "
                "it, as in `model, optimizer = offload.wrap(model, optimizer, ...)`"
            )
        return optimizer

    def trains(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is the model's, and was trainable when it was wrapped."""
        return parameter in self._trained

    def counters(self) -> dict[str, int]:
        """Bytes read from and written to storage so far."""
        store = self._assembly.resources.store
        return {"read_bytes": 0, "written_bytes": 0} if store is None else store.counters()

    def written_by_drive(self) -> dict[str, int]:
        """Bytes written to each storage directory so far."""
        store = self._assembly.resources.store
        return {} if store is None else store.written_by_directory()

    @property
    def trainable_numel(self) -> int:
        """Trainable parameters."""
        trainable = (s for block in [*self.blocks, self.root] for s in block.layout.trainable_segments)
        return sum(segment.numel for segment in trainable)

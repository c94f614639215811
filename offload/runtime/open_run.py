"""A run from wrap to close: what it refuses when it is over, and what can be asked of it at any time."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload.cut_short import MayBeCutShort
from offload.errors import UsageError
from offload.runtime.assembly import Assembly
from offload.runtime.gradient_norms import GradientNorms
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.saves import SavesBeside
from offload.runtime.state_dicts import Uncopied
from offload.runtime.trained_parameters import TrainedParameters
from offload.runtime.training_state import Stateful, checked_stateful
from offload.runtime.written_parameters import WrittenParameters
from offload.stores.block_store import BlockRecord
from offload.telemetry import Stalls

CLOSED = (
    "the offload engine is closed, and the parameters went with it: load the model again and offload.wrap it; "
    "offload.resume then goes on from a checkpoint, or from the storage directory of a run with durability='step'. "
    "Call model.state_dict(), offload.export or offload.save before close()"
)

CUT_SHORT = (
    "Ctrl-C (KeyboardInterrupt) came while the engine was moving or updating blocks, and this run cannot go on with "
    "what was left in the middle: call model.offload.close(), load the model again and offload.wrap it; offload.resume "
    "then goes on from the last checkpoint, or with durability='step' from the last committed step. To stop where a "
    "run can go on, let a handler of SIGINT set a flag, and look at it after optimizer.step()"
)

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""Torch 2.4 does not tell."""


class OpenRun(Uncopied, MayBeCutShort, ABC):
    """The part of an engine that does nothing to blocks."""

    root: BlockRecord
    blocks: list[BlockRecord]
    _assembly: Assembly
    _trained: TrainedParameters
    _written: WrittenParameters
    _optimizer: weakref.ref[OffloadOptimizer]
    _norms: GradientNorms
    stalls: Stalls
    saves: SavesBeside
    tracked: dict[str, Stateful]

    def __init__(self) -> None:
        self._closed = False
        self._pid = os.getpid()
        self._undo: list[Callable[[], None]] = []

    @abstractmethod
    def _may_be_cut_short(self) -> list[MayBeCutShort]:
        """Everything whose methods may have been left in the middle."""

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closed

    def when_closed(self, undo: Callable[[], None]) -> None:
        """Let `close` call `undo()`."""
        self._undo.append(undo)

    def refuse_unless_open(self) -> None:
        """Raise UsageError after `close`, after Ctrl-C in the middle of what cannot be left, in a process that was
        forked from the run's, and where the model is being traced."""
        if self._closed:
            raise UsageError(CLOSED)
        self.refuse_cut_short()
        if os.getpid() != self._pid:
            raise UsageError(
                "this process was forked from the one that trains and has neither the model's memory nor its drives: "
                "compute there, or export the model and load it here"
            )
        if torch.jit.is_tracing() or _is_exporting():  # type: ignore[attr-defined]  # it is documented
            raise UsageError(
                "torch.export and torch.jit.trace would keep what happens to be where a block's parameters pass: "
                "give model.state_dict() to a model made anew, or load what offload.export writes, and take that one"
            )

    def refuse_cut_short(self) -> None:
        """Raise UsageError after Ctrl-C in the middle of what cannot be left."""
        if any(part.is_cut_short for part in self._may_be_cut_short()):
            raise UsageError(CUT_SHORT)

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

    def grad_norm(self) -> torch.Tensor | None:
        """Global norm of the gradients that wait for `optimizer.step()`, divided by the loss scale.

        None without `max_grad_norm` (which may be infinite) or durability 'step', and when there is no gradient.
        """
        optimizer = self._optimizer()
        return None if optimizer is None else self._norms.total(optimizer)

    def wait_saved(self) -> None:
        """Until the checkpoint that `offload.save(..., wait=False)` began is complete.

        Raises StoreError when it could not be written; earlier ones are intact, and training may go on.
        """
        with self.stalls.waiting("save"):
            self.saves.wait()

    def track(self, **state: Any) -> None:
        """With durability 'step': whose state_dict() belongs to a step: LR schedulers, the position in the data."""
        self.tracked.update(checked_stateful(state))

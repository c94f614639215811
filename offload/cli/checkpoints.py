"""The checkpoints of `offload finetune`: when one is due, what they have written, and going on from one."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from offload.checkpoint import resume, save
from offload.cli.output import Output
from offload.cli.settings import Settings
from offload.config import parse_nbytes
from offload.errors import StoreError
from offload.runtime.engine import OffloadEngine

MANIFEST_NBYTES, CHUNK_NBYTES, PARAMETER_NBYTES = 1 << 15, 16, 256
"""Room in a manifest for the training state, a chunk's two checksums and a parameter, as text."""


class Checkpoints:
    """Periodic ones go on beside training; the last one, and that of a run that is stopped, is waited for."""

    def __init__(self, model: nn.Module, tracked: dict[str, Any], settings: Settings, output: Output) -> None:
        self._engine: Any = model.offload
        self._model, self._tracked, self._settings, self._output = model, tracked, settings, output
        self._begun: tuple[int, str] | None = None
        self._complete_nbytes = self._largest_nbytes = 0
        self.saved_step: int | None = None
        """That of the last complete one."""

    @property
    def next_nbytes(self) -> int:
        """Bytes that one more checkpoint would write; 0 when none is wanted."""
        if self._settings.checkpoints is None:
            return 0
        buffers = [b for block in [self._engine.root, *self._engine.blocks] for b in block.layout.buffers]
        n_chunks = sum(-(-b.n_elements // self._engine.config.chunk_elements) for b in buffers)
        n_parameters = sum(len(b.segments) for b in buffers)
        manifest_nbytes = MANIFEST_NBYTES + CHUNK_NBYTES * n_chunks + PARAMETER_NBYTES * n_parameters
        manifest_nbytes += sum(b.rule.encoded_statistics_nbytes(s.shape) for b in buffers for s in b.segments)
        return max(self.state_nbytes + manifest_nbytes, self._largest_nbytes)

    @property
    def state_nbytes(self) -> int:
        """Bytes of all parameters and their state: the most that the updates of one step write."""
        layouts = [block.layout for block in [self._engine.root, *self._engine.blocks]]
        return sum(layout.slot_nbytes + layout.state_nbytes for layout in layouts)

    @property
    def written_nbytes(self) -> int:
        """By checkpoints so far; one that is being written counts in full."""
        return self._complete_nbytes + (0 if self._begun is None else self.next_nbytes)

    def resume(self) -> int:
        """Steps made already."""
        if self._settings.resume is None:
            return 0
        found = resume(self._model, self._settings.resume, state=self._tracked)
        self._output.note(f"resumed from {found.path}, after step {found.step}")
        return found.step

    def is_due(self, step: int) -> bool:
        """Whether the step is to be followed by one that training does not wait for."""
        every = self._settings.save_every
        return self._settings.checkpoints is not None and every is not None and step % every == 0

    def after_step(self, step: int, stopping: bool) -> None:
        """Begin one when it is due; `stopping`, and after the last step, complete it.

        Raises StoreError when one could not be written, also one begun earlier, unless a later one has taken its place.
        """
        if self._settings.checkpoints is None:
            return
        if stopping or step == self._settings.steps:
            self._save_last(step)
        elif self.is_due(step):
            self.wait()
            self._begin(step, wait=False)
        elif not self._engine.saves.going_on:
            self.wait()

    def _save_last(self, step: int) -> None:
        try:
            self.wait()
        except StoreError as error:
            self._output.note(f"{error}; the state after step {step} is saved instead")
        self._begin(step, wait=True)
        self.wait()

    def _begin(self, step: int, *, wait: bool) -> None:
        path = save(
            self._model,
            str(self._settings.checkpoints),
            state=self._tracked,
            keep_last=self._settings.keep_last,
            wait=wait,
        )
        self._begun = step, path

    def wait(self) -> None:
        """Complete what has been begun, and say so. Raises StoreError when it could not be written."""
        begun = self._begun
        if begun is None:
            return
        try:
            self._engine.wait_saved()
        except StoreError:
            self._begun = None
            self._complete_nbytes += self.next_nbytes  # as much as it may have written
            raise
        (step, path), self._begun = begun, None
        self.saved_step = step
        nbytes = sum(entry.stat().st_size for entry in os.scandir(path))
        self._complete_nbytes += nbytes
        self._largest_nbytes = max(self._largest_nbytes, nbytes)
        self._output.note(f"saved {path}")

    def settle(self, *, at_once: bool) -> None:
        """The run ends with an error: let what is being written be complete first, unless it is to end `at_once`."""
        if at_once and self._engine.saves.going_on:
            return
        try:
            self.wait()
        except StoreError as error:
            self._output.note(str(error))


class WriteBudget:
    """Says when to stop: before a step, and what is saved after it, could write more than --write-budget allows.

    Updates go on when a step has ended, so bytes of it may not be counted yet. As long as two steps of all the state
    there is fit, that does not matter; closer to the budget, what is to be written is waited for and then counted.
    """

    def __init__(self, budget: str | None, checkpoints: Checkpoints, engine: OffloadEngine) -> None:
        self._nbytes = None if budget is None else parse_nbytes(budget)
        self._checkpoints, self._engine = checkpoints, engine
        self._before_nbytes, self._most_nbytes = self._written_nbytes(), 0

    def _written_nbytes(self) -> int:
        """Into the store so far, checkpoints not counted."""
        return sum(self._engine.written_by_drive().values())

    def is_used_up(self, step: int) -> bool:
        """Whether `step` is to be the last."""
        if self._nbytes is None:
            return False
        if self._exceeded(step, 2 * max(self._most_nbytes, self._checkpoints.state_nbytes)):
            self._engine.flush()
            self._engine.wait_committed()
        written_nbytes = self._written_nbytes()
        self._most_nbytes = max(self._most_nbytes, written_nbytes - self._before_nbytes)
        self._before_nbytes = written_nbytes
        return self._exceeded(step, self._most_nbytes)

    def _exceeded(self, step: int, one_more_nbytes: int) -> bool:
        """By a step that writes so much, and the checkpoints that are due now and after it."""
        due = self._checkpoints.next_nbytes * (1 + self._checkpoints.is_due(step))
        total_nbytes = self._written_nbytes() + self._checkpoints.written_nbytes + due + one_more_nbytes
        return total_nbytes > (self._nbytes or 0)

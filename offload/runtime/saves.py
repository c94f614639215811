"""The checkpoint that is being written while training goes on: one at a time."""

from __future__ import annotations

import contextlib

from offload.errors import OffloadError
from offload.runtime.scheduler import Scheduler
from offload.runtime.training_state import Saving


class SavesBeside:
    """Lets updates wait for what a save has not copied yet, and whoever wants to for its end."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._saving: Saving | None = None
        self._read_before_nbytes = 0

    def begin(self, saving: Saving) -> None:
        """Write a checkpoint of this step boundary; the one before has been waited for."""
        self._saving, self._scheduler.before_update = saving, saving.before_update
        saving.start()

    @property
    def going_on(self) -> bool:
        """Whether `wait` would have to wait."""
        return self._saving is not None and not self._saving.done

    @property
    def read_nbytes(self) -> int:
        """Read from the store by all saves beside training so far; `OffloadEngine.counters` has them too."""
        return self._read_before_nbytes + (0 if self._saving is None else self._saving.read_nbytes)

    def wait(self) -> None:
        """Until nothing is being written. Raises StoreError when it could not be; updates wait for nothing then."""
        saving = self._saving
        if saving is None:
            return
        try:
            saving.wait()
        finally:
            if saving.done:  # Ctrl-C may end the waiting alone
                self._saving = None
                self._read_before_nbytes += saving.read_nbytes
                self._scheduler.before_update = lambda _: None

    def give_up(self) -> None:
        """The run is being stopped at once: what is being written ends soon, and leaves nothing."""
        if self._saving is not None:
            self._saving.give_up()

    def end(self) -> None:
        """Its memory and files are about to go: let what is being written end, whatever becomes of it."""
        with contextlib.suppress(OffloadError):
            self.wait()

"""Whether what is read from storage is compared with its checksums: as asked, or for as long as that costs little."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

logger = logging.getLogger("offload")

COST_MAX = 0.03
"""Of a step's seconds."""

STEPS_MEASURED = 4
"""The first is not counted: it makes what later ones find."""


class Verification:
    """`asked` "auto": on, until the first steps show that it takes more than `COST_MAX` of a step.

    `spent_s` gives the seconds spent so far in comparing, of the threads that do it each its share. They count as if
    nothing ran beside them, so the true cost is at most what is measured.
    """

    def __init__(self, asked: bool | Literal["auto"], spent_s: Callable[[], float]) -> None:
        self.on = asked is not False
        self.cost: float | None = None
        """Fraction of a step, once it has been measured."""
        self._undecided = asked == "auto"
        self._spent_s = spent_s
        self._n_steps = 0
        self._began_s = self._spent_before_s = 0.0

    def step_ended(self) -> bool:
        """A step has ended. Whether verification has just been given up."""
        self._n_steps += 1
        if not self._undecided:
            return False
        if self._n_steps == 1:
            self._began_s, self._spent_before_s = time.perf_counter(), self._spent_s()
            return False
        if self._n_steps <= STEPS_MEASURED:
            return False
        self._undecided = False
        self.cost = (self._spent_s() - self._spent_before_s) / (time.perf_counter() - self._began_s)
        if self.cost <= COST_MAX:
            return False
        self.on = False
        logger.warning(
            "what is read is not verified from now on: it takes %.1f %% of a step, more than %.0f %%; "
            "verify_reads=True keeps it (resuming and `offload inspect --verify` always compare)",
            100 * self.cost,
            100 * COST_MAX,
        )
        return True

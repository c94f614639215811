"""Samples a second, as loops read them from `engine.tput_timer`."""

from __future__ import annotations

import time

SETTLING_STEPS = 2
"""Steps before the first that is timed, as in DeepSpeed: they allocate and measure."""


class ThroughputTimer:
    """Counts micro-steps, steps and epochs, and times from `start` (a forward) to `stop` (the end of `step`).

    The engine calls both; what a loop does between two micro-steps, loading data or evaluating, is not counted.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = 0.0
        self._timed_steps = 0
        self._since: float | None = None

    def update_epoch_count(self) -> None:
        """An epoch is over: micro-steps count from 0 again."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """A micro-step begins. Where one has begun already, and was not ended, this is the beginning."""
        self._since = time.perf_counter()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """A micro-step has ended, and with `global_step` a step. Without a `start` before it nothing happens."""
        del report_speed  # the engine reports
        if self._since is None:
            return
        elapsed, self._since = time.perf_counter() - self._since, None
        self.micro_step_count += 1
        if self.global_step_count >= SETTLING_STEPS:
            self.total_elapsed_time += elapsed
            self._timed_steps += global_step
        self.global_step_count += global_step

    def avg_samples_per_sec(self) -> float:
        """Samples of the steps that were timed over their seconds; minus infinity before there is one."""
        if not self._timed_steps:
            return float("-inf")
        return self.batch_size * self._timed_steps / self.total_elapsed_time

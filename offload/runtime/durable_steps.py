"""When a step is committed and when it is taken back, where every step is durable; `commits.py` says how."""

from __future__ import annotations

import logging
import math

from offload.runtime.commits import StepCommits
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.scheduler import Scheduler
from offload.stores.block_store import BlockRecord
from offload.telemetry import Stalls

logger = logging.getLogger("offload")


class DurableSteps:
    """`limit` is the norm above which a step is discarded whose updates did not wait for it; None: there is none."""

    def __init__(
        self,
        commits: StepCommits,
        root: BlockRecord,
        blocks: list[BlockRecord],
        scheduler: Scheduler,
        stalls: Stalls,
        limit: float | None,
    ) -> None:
        self.commits = commits
        self._root, self._blocks = root, blocks
        self._scheduler, self._stalls, self._limit = scheduler, stalls, limit
        scheduler.gate, scheduler.host.check_commit = commits.gate, commits.check

    def before_update(self, optimizer: OffloadOptimizer) -> None:
        """The step before must be on its way to the drives: what an update writes waits for that, as it overwrites the
        one before. Before the first, which no forward of a block may have come before, that is the initial state."""
        if not self.commits.started:
            self.commits.start(optimizer)
        if self.commits.due:
            for block in self._blocks:
                if block.pending_update:  # not used in this forward
                    self._scheduler.fetch(block, must=True)
            self.commits.begin(optimizer)
        self.commits.check()

    def wait(self, optimizer: OffloadOptimizer) -> None:
        """Until the step before is on the drives."""
        if not self.commits.started:
            return  # nothing has been updated
        self.before_update(optimizer)
        with self._stalls.waiting("commit"):
            self.commits.wait()

    def discards(self, optimizer: OffloadOptimizer) -> bool:
        """Take the step back where its gradients are not finite, or above the limit that updates did not wait for."""
        if optimizer.grad_norm is None:
            return False
        total = float(optimizer.grad_norm)
        if math.isfinite(total) and (self._limit is None or total <= self._limit):
            return False
        self._discard(optimizer, total)
        return True

    def _discard(self, optimizer: OffloadOptimizer, norm: float) -> None:
        """Leave the parameters and their states as the step before made them."""
        self._scheduler.drop_undone()
        for block in [*self._blocks, self._root]:
            self._scheduler.wait_resident(block)
            self._scheduler.wait_loaded(block)
        for block in self.commits.roll_back(optimizer):
            self._scheduler.drop_copies(block)
        optimizer.discarded_steps += 1
        logger.warning("step %d is discarded: its gradients' norm is %s", optimizer.steps_made + 1, norm)

"""The search itself: the fastest point of the space that fits.

[Note: what is left out] Shapes are looked at in the order of the least step each could have (bounds.py), until that is
longer than a step that was found, and of each shape only saved sets whose least step is not. The result is that of
looking at all: those found are compared in the order of the space, and one that is longer by `MARGIN` neither wins nor
decides between others. (Comparing by `TIE` is not transitive, but n shapes bridge no more than some n times `TIE`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offload.errors import ConfigError
from offload.planner.bounds import least_step_s
from offload.planner.cost_model import CostModel
from offload.planner.hardware import Hardware
from offload.planner.memory import Shape
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN
from offload.planner.plan import Budgets, state_format_of
from offload.planner.space import Space, space_of
from offload.planner.tables import Needs, Tables
from offload.planner.workload import Workload

NBYTES_MAX = 1 << 59
"""Of activations: sums with them stay whole numbers of 64 bits."""
TIE = 1e-9
"""Steps that differ by less than this fraction count as equally long: then the plan that writes less is taken."""
MARGIN = 1e-4
"""A shape is left out where its least step is longer by this fraction than one that was found."""


@dataclass(frozen=True)
class Chosen:
    """One point of the space: a shape and an index into its tables."""

    shape: Shape
    index: tuple[int, ...]
    step_s: float
    rank: tuple[float, ...]
    """Among equals the smallest: bytes written, micro-batches, buffers, distance from a window of three slots."""


def shapes(space: Space) -> Iterator[Shape]:
    """Every combination that sets the working memory."""
    for micro_batches in space.micro_batches:
        for n_slots in space.n_slots:
            for n_grad_buffers in space.n_grad_buffers:
                for boundary in space.boundary_on_device:
                    if not boundary and micro_batches < space.off_device_micro_batches_min:
                        continue
                    yield Shape(micro_batches, n_slots, n_grad_buffers, boundary)


class Search:
    """One workload, machine, batch and set of fixed choices; budgets may vary from call to call. `like`: see Tables."""

    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        budgets: Budgets,
        fixed: Mapping[str, Any],
        batch_samples: int,
        like: Search | None = None,
    ) -> None:
        if not workload.blocks:
            raise ConfigError(f"model {workload.name} has no blocks: there is nothing to stream")
        if batch_samples < 1:
            raise ConfigError(f"batch_samples={batch_samples} must be 1 or more")
        needed = batch_samples * sum(
            b.input_nbytes_per_sample + sum(t.nbytes_per_sample for t in b.saved) for b in workload.blocks
        )
        if needed > NBYTES_MAX:
            raise ConfigError(
                f"batch_samples={batch_samples}: backward needs {needed:.2g} bytes of so many sequences of "
                f"{workload.tokens_per_sample} tokens; give a smaller batch"
            )
        self.workload = workload
        self.hardware = hardware
        self._again = (budgets, fixed)
        self.space = space_of(workload, budgets, fixed, batch_samples, hardware.shares_host)
        self.model = CostModel(
            workload,
            hardware,
            state_format_of(workload),
            batch_samples,
            durable_steps=budgets.durable_steps,
        )
        self.tables: Tables = Tables(self.model, hardware, self.space, None if like is None else like.tables)

    def with_batch(self, batch_samples: int, like: Search | None = None) -> Search:
        """The same search for another batch. Raises ConfigError when a fixed choice forbids it. `like`: see Tables."""
        return Search(self.workload, self.hardware, *self._again, batch_samples, like)

    def without_capacity(self) -> Search:
        """The same search on drives of unlimited capacity."""
        drives = tuple(d.model_copy(update={"capacity_nbytes": None}) for d in self.hardware.drives)
        hardware = self.hardware.model_copy(update={"drives": drives})
        return Search(self.workload, hardware, *self._again, self.model.batch, self)

    def shapes_that_fit(self, budgets: Budgets) -> Iterator[Shape]:
        """Shapes whose working memory the device can hold."""
        for shape in shapes(self.space):
            if self.tables.device_nbytes(shape) <= budgets.device_nbytes:
                yield shape

    def least_host_nbytes(self, shape: Shape) -> int:
        """Host memory below which this shape cannot run, device memory unlimited, without the update's staging."""
        model, need = self.model, self.tables.host_nbytes(shape, 0, ACTIVATION_STAGING_NBYTES_MIN)
        if model.rates.storage is None:
            need += int(self.tables.params_cum[-1] + self.tables.states_cum[-1])
            need += min(
                sum(model.grad_nbytes) if count == len(model.grad_nbytes) else 0
                for count in self.space.deferred_blocks
            )
        return need

    def shape_fits(self, shape: Shape, budgets: Budgets) -> bool:
        """Whether any plan of this shape keeps to these budgets."""
        if self.tables.device_nbytes(shape) > budgets.device_nbytes:
            return False
        if self.least_host_nbytes(shape) > budgets.host_memory_nbytes:
            return False
        return bool(self.tables.needs(shape, budgets).fits.any())

    def fits(self, budgets: Budgets) -> bool:
        """Whether any plan keeps to these budgets."""
        return any(self.shape_fits(shape, budgets) for shape in shapes(self.space))

    def best(self, budgets: Budgets, limit_s: float = math.inf) -> Chosen | None:
        """The fastest point that fits, or None. Where a step takes longer than `limit_s` it may be None, or another.

        See [Note: what is left out].
        """
        every = list(self.shapes_that_fit(budgets))
        if not every:
            return None
        least_s = least_step_s(self.tables, every, budgets)
        found: dict[int, Chosen] = {}
        for number in np.argsort(least_s.min(axis=1), kind="stable"):
            sets = np.flatnonzero(least_s[number] <= limit_s * (1 + MARGIN))
            if not len(sets):
                break
            needs = self.tables.needs(every[number], budgets, sets)
            if needs.fits.any():
                found[number] = self._best_of(every[number], needs, sets)
                limit_s = min(limit_s, found[number].step_s)
        best: Chosen | None = None
        for _, chosen in sorted(found.items()):
            if best is None or _better(chosen, best):
                best = chosen
        return best

    def _best_of(self, shape: Shape, needs: Needs, sets: npt.NDArray[np.int64]) -> Chosen:
        """The best of these saved sets."""
        cost = self.model.cost(needs.load)
        step_s = np.where(needs.fits, np.broadcast_to(cost.step_s, needs.fits.shape), np.inf)
        least = float(step_s.min())
        written: Any = sum(t.written for t in cost.traffic)
        written = np.where(step_s <= least * (1 + TIE), np.broadcast_to(written, needs.fits.shape), np.inf)
        index = tuple(int(i) for i in np.unravel_index(int(written.argmin()), written.shape))
        rank = (
            float(written[index]),
            shape.micro_batches,
            -shape.n_grad_buffers,
            abs(shape.n_slots - 3),
            not shape.boundary_on_device,
        )
        at_waiting, at_saved, at_host, at_params = index
        whole = (at_waiting, int(sets[at_saved]), at_host, at_params)
        return Chosen(shape, whole, float(step_s[index]), rank)


def _better(found: Chosen, best: Chosen) -> bool:
    """Shorter, or as long and of better rank."""
    if found.step_s < best.step_s * (1 - TIE):
        return True
    return found.step_s <= best.step_s * (1 + TIE) and found.rank < best.rank

"""`make_plan`: the fastest plan that every budget allows, found by trying the whole space of `space.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from offload.errors import BudgetError, ConfigError
from offload.planner.activations import spread, spread_order
from offload.planner.cost_model import Cost, CostModel, Load
from offload.planner.hardware import Hardware
from offload.planner.memory import Shape
from offload.planner.placement import BlockBytes, Placement, place
from offload.planner.plan import INPUT, Budgets, Outcome, Plan, Prediction, state_format_of
from offload.planner.space import Space, space_of
from offload.planner.tables import Needs, Tables, chunk_rows, waiting_in_host
from offload.planner.workload import Workload

TIE = 1e-9
"""Steps that differ by less than this fraction count as equally long: then the plan that writes less is taken."""


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
                    yield Shape(micro_batches, n_slots, n_grad_buffers, boundary)


class Search:
    """One workload, machine, batch and set of fixed choices; budgets may vary from call to call."""

    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        budgets: Budgets,
        fixed: Mapping[str, Any],
        batch_samples: int,
    ) -> None:
        if not workload.blocks:
            raise ConfigError(f"model {workload.name} has no blocks: there is nothing to stream")
        if batch_samples < 1:
            raise ConfigError(f"batch_samples={batch_samples} must be 1 or more")
        self.workload = workload
        self.hardware = hardware
        self.space = space_of(workload, budgets, fixed, batch_samples, hardware.shares_host)
        self.model = CostModel(workload, hardware, state_format_of(workload), batch_samples)
        self.tables = Tables(self.model, hardware, self.space)

    def best(self, budgets: Budgets) -> Chosen | None:
        """The fastest point that fits, or None."""
        best: Chosen | None = None
        for shape in shapes(self.space):
            if self.tables.device_nbytes(shape) > budgets.device_memory_nbytes:
                continue
            needs = self.tables.needs(shape, budgets)
            if not needs.fits.any():
                continue
            found = self._best_of(shape, needs)
            if best is None or found.step_s < best.step_s * (1 - TIE):
                best = found
            elif found.step_s <= best.step_s * (1 + TIE) and found.rank < best.rank:
                best = found
        return best

    def _best_of(self, shape: Shape, needs: Needs) -> Chosen:
        step_s = np.where(needs.fits, np.broadcast_to(self.model.cost(needs.load).step_s, needs.fits.shape), np.inf)
        least = float(step_s.min())
        written: Any = sum(t.written for t in self.model.traffic(needs.load))
        written = np.where(
            step_s <= least * (1 + TIE), np.broadcast_to(written, needs.fits.shape), np.inf
        )
        index = tuple(int(i) for i in np.unravel_index(int(written.argmin()), written.shape))
        rank = (
            float(written[index]),
            shape.micro_batches,
            -shape.n_grad_buffers,
            abs(shape.n_slots - 3),
            not shape.boundary_on_device,
        )
        return Chosen(shape, index, float(step_s[index]), rank)

    def plan_of(self, chosen: Chosen, budgets: Budgets) -> Plan:
        """Turn a point into a plan: which block, which tensor."""
        tables, space = self.tables, self.space
        needs = tables.needs(chosen.shape, budgets)
        at_deferred, at_saved, at_host, at_grads = chosen.index
        n_blocks = len(self.workload.blocks)
        deferred = spread(n_blocks, space.deferred_blocks[at_deferred])
        grads_in_host = set(waiting_in_host(deferred, space.grads_host_fractions[at_grads]))
        load = _at(needs.load, chosen.index, needs.fits.shape)
        params_in_host, states_in_host = self._placed(load)
        return Plan(
            model=self.workload.name,
            hardware=self.hardware.name,
            batch_samples=self.model.batch,
            tokens_per_sample=self.workload.tokens_per_sample,
            state_format=self.model.format,
            micro_batches=chosen.shape.micro_batches,
            n_slots=chosen.shape.n_slots,
            n_grad_buffers=chosen.shape.n_grad_buffers,
            boundary_on_device=chosen.shape.boundary_on_device,
            deferred_blocks=tuple(deferred),
            params_in_host=params_in_host,
            grads_in_host=tuple(i in grads_in_host for i in range(n_blocks)),
            states_in_host=states_in_host,
            activations=self._activations(chosen, needs, at_saved, at_host, budgets),
            predicted=self._prediction(needs, load, chosen.index),
        )

    def _placed(self, load: Load) -> tuple[tuple[bool, ...], tuple[float, ...]]:
        """Which block's parameters and how much of whose state: `placement.place` over the bytes set aside for them."""
        model = self.model
        nothing = BlockBytes(0, (), 0)
        order = spread_order(len(self.workload.blocks))
        root = model.format.state_nbytes * self.workload.root_trainable_numel
        rows = chunk_rows(model.state_nbytes, root)
        params = _place([BlockBytes(model.slot_nbytes[i], (), 0) for i in order], nothing, load.params_host_nbytes)
        states = _place(
            [BlockBytes(0, row, 0) for row in rows],
            nothing,
            load.states_host_nbytes + load.root_states_host_nbytes,
        )
        params_in_host = [False] * len(order)
        for block, inside in zip(order, params.params_in_host, strict=True):
            params_in_host[block] = inside
        held = [0] * (len(order) + 1)
        for number, row in enumerate(rows):
            count = states.host_chunks[number]
            if number == len(rows) - 1:
                held[-1] = sum(row[:count])
                continue
            for block in range(count):
                held[block] += row[block]
        fractions = [
            nbytes / whole if whole else 1.0
            for nbytes, whole in zip(held, [*model.state_nbytes, root], strict=True)
        ]
        return tuple(params_in_host), tuple(fractions)

    def _activations(
        self, chosen: Chosen, needs: Needs, at_saved: int, at_host: int, budgets: Budgets
    ) -> tuple[dict[str, Outcome], ...]:
        tables = self.tables
        order = tables.order(chosen.shape.boundary_on_device)
        spare = budgets.device_memory_nbytes - needs.device_nbytes
        kept_at = int(tables.kept_positions(order, spare)[at_saved])
        to_host = order.to_host[at_saved, at_host]
        saved = tables.saved[at_saved]
        outcomes: list[dict[str, Outcome]] = [{} for _ in self.workload.blocks]
        for position, (block, name, _) in enumerate(order.units):
            if name != INPUT and (block, name) not in saved:
                outcomes[block][name] = "recompute"
                continue
            may_stay = name != INPUT or chosen.shape.boundary_on_device
            if position < kept_at and may_stay:
                outcomes[block][name] = "device"
            else:
                outcomes[block][name] = "host" if to_host[position] else "storage"
        return tuple(outcomes)

    def _prediction(self, needs: Needs, load: Load, index: tuple[int, ...]) -> Prediction:
        shape = needs.fits.shape
        peaks = {
            "device": needs.device_nbytes + float(needs.kept_nbytes[index[1]]),
            "host": float(np.broadcast_to(needs.host_nbytes + needs.placed_nbytes, shape)[index]),
            "storage": float(np.broadcast_to(needs.storage_nbytes, shape)[index]),
        }
        return predict(self.model, load, {tier: int(nbytes) for tier, nbytes in peaks.items()})


def _place(units: list[BlockBytes], root: BlockBytes, host_nbytes: float) -> Placement:
    """`placement.place` over the host memory set aside for one kind of state."""
    return place(
        units,
        root,
        device_nbytes=8 * sum(u.slot_nbytes for u in units),
        host_nbytes=int(host_nbytes),
        staging_nbytes=0,
        has_storage=True,
        deferred=False,
        prefetch_blocks=None,
    )


def _at(load: Load, index: tuple[int, ...], shape: tuple[int, ...]) -> Load:
    """One combination out of a load of arrays."""
    values = {
        name: float(np.broadcast_to(value, shape)[index]) if isinstance(value, np.ndarray) else value
        for name, value in vars(load).items()
    }
    return Load(**values)


def predict(model: CostModel, load: Load, peak_nbytes: dict[str, int]) -> Prediction:
    """What the cost model says of one load."""
    cost: Cost = model.cost(load)
    phases = cost.traffic
    step_s = float(cost.step_s)
    seconds = {name: float(cost.forward[name] + cost.backward[name]) for name in cost.forward}
    longest = {
        phase_s: max(phase, key=lambda name: float(phase[name]))
        for phase_s, phase in ((float(cost.forward_s), cost.forward), (float(cost.backward_s), cost.backward))
    }
    return Prediction(
        step_s=step_s,
        forward_s=float(cost.forward_s),
        backward_s=float(cost.backward_s),
        tail_s=float(cost.tail_s),
        lower_bound_s=float(cost.lower_bound_s),
        tokens_per_s=model.batch * model.workload.tokens_per_sample / step_s,
        model_flops=float(model.forward_flops + model.backward_flops),
        hardware_flops=float(model.forward_flops + model.backward_flops + load.recompute_flops),
        forward_seconds={name: float(value) for name, value in cost.forward.items()},
        backward_seconds={name: float(value) for name, value in cost.backward.items()},
        bytes={
            "read": float(sum(t.read for t in phases)),
            "written": float(sum(t.written for t in phases)),
            "h2d": float(sum(t.h2d for t in phases)),
            "d2h": float(sum(t.d2h for t in phases)),
            "dram": sum(float(t.dram(model.update_dram_nbytes, model.rates.shares_host)) for t in phases),
        },
        peak_nbytes=peak_nbytes,
        binding=longest[max(longest)] if longest else max(seconds, key=lambda name: seconds[name]),
    )


def make_plan(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any] | None = None,
    *,
    batch_samples: int,
) -> Plan:
    """The fastest plan for one step of `batch_samples` sequences that keeps to every budget.

    `fixed` holds the user's own choices by name (`space.FIXABLE`); the planner chooses the rest. Raises ConfigError
    for a fixed choice that cannot be understood and BudgetError, with the nearest changes that would do, when nothing
    fits. Deterministic.
    """
    fixed = fixed or {}
    search = Search(workload, hardware, budgets, fixed, batch_samples)
    chosen = search.best(budgets)
    if chosen is None:
        from offload.planner.explain import why_not

        raise BudgetError(why_not(search, budgets))
    return search.plan_of(chosen, budgets)

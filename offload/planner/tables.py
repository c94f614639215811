"""For one shape of working memory: every combination of the other choices as numpy arrays, with what each needs.

Axes: update mode with the share of waiting gradients in host memory, saved set, share of swapped units in host memory,
share of parameters in host memory. What host memory is left then goes to optimizer state. With all but the budget
fixed, a larger budget leaves less to be moved in every phase, so it cannot make a step longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from offload.planner.activations import Candidates, candidates, everything, spread, spread_order, unit_order
from offload.planner.cost_model import CostModel, Load
from offload.planner.hardware import Hardware
from offload.planner.memory import (
    Shape,
    device_need,
    durable_nbytes,
    host_need,
    read_ahead_nbytes,
    samples_of_micro_batch,
)
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN, state_order
from offload.planner.plan import INPUT, Budgets
from offload.planner.space import Space
from offload.planner.workload import Workload
from offload.types import PAGE_NBYTES

Floats = npt.NDArray[np.float64]
STATE_CHUNKS_PER_BLOCK = 64
HOLDS_FROM_BLOCKS = 4
"""With fewer blocks no update is held until backward has ended."""


@dataclass(frozen=True)
class Needs:
    """What each combination needs of each tier, in bytes, and what it leaves to be moved."""

    device_nbytes: int
    """Without what is kept there by choice."""
    kept_nbytes: Floats
    """[saved set, share]: with what comes back there ahead of its use."""
    host_nbytes: Floats
    """The least; parameters and state placed there by choice come on top."""
    placed_nbytes: Floats
    storage_nbytes: Floats
    fits: npt.NDArray[np.bool_]
    """Of the full shape of all axes."""
    load: Load


@dataclass(frozen=True)
class Order:
    """Units in the order in which they are kept; cumulative bytes of the whole batch for each saved set."""

    units: list[tuple[int, str, int]]
    to_host: npt.NDArray[np.bool_]
    """[saved set, share, position]: swapped to host memory, the others to storage; evenly spread over the units, so
    that neither tier is used in bursts."""
    keepable: Floats
    """[saved set, position]: what may stay on the device."""
    keepable_to_host: Floats
    """[saved set, share, position]: the part of it that goes to host memory if it does not stay."""
    always_nbytes: float
    """What must be swapped out: block inputs where the boundary is not on the device."""
    always_to_host: Floats
    """[saved set, share]: the part of that which goes to host memory."""


class Tables:
    """Precomputed sums of one workload, and `needs` for each shape.

    `like`: tables of a workload whose saved tensors may be the same, where what is known of these is taken from.
    """

    def __init__(
        self, model: CostModel, hardware: Hardware, space: Space, like: Tables | None = None
    ) -> None:
        self.model = model
        self.hardware = hardware
        self.space = space
        workload = model.workload
        tensors = tuple((block.input_nbytes_per_sample, block.saved) for block in workload.blocks)
        self._orders_by = (
            tensors,
            model.batch,
            space.activations,
            space.inputs,
            space.swapped_host_fractions,
        )
        """All that `candidates`, `saved` and `order` depend on."""
        same = like is not None and like._orders_by == self._orders_by
        self._like: Tables | None = like if same else None
        self.candidates: Candidates
        self.saved: list[set[tuple[int, str]]]
        if self._like is None:
            self.candidates = _candidates(workload, space)
            self.saved = [self.candidates.members(c) for c in range(len(self.candidates.counts))]
        else:
            self.candidates, self.saved = self._like.candidates, self._like.saved
        order = spread_order(len(workload.blocks))
        frozen = [model.format.param_nbytes * workload.blocks[i].frozen_numel for i in order]
        self.params_cum = _cumulative(np.array([model.slot_nbytes[i] for i in order], dtype=np.float64))
        self._frozen_cum = _cumulative(np.array(frozen, dtype=np.float64))
        n_blocks = len(workload.blocks)
        self.params_counts = np.array(
            sorted({round(share * n_blocks) for share in space.params_host_fractions})
        )
        """[parameters]: blocks whose parameters live in host memory."""
        self.root_states = model.format.state_of(workload.root_stored_numel)
        pieces = [nbytes for _, nbytes in state_pieces(model.state_nbytes, self.root_states)]
        self.states_cum = np.concatenate(([0], np.cumsum(pieces))).astype(np.float64)

    def device_nbytes(self, shape: Shape) -> int:
        """Device memory before anything is kept there by choice."""
        model = self.model
        shares_host = model.rates.shares_host
        need = device_need(model.workload, model.format, model.batch, shape, shares_host=shares_host).total
        return need + (model.input_nbytes if self.space.inputs == "device" else 0)

    def order(self, boundary_on_device: bool) -> Order:
        """Cumulative bytes of units in the order in which they are kept."""
        if self._like is not None:
            return self._like.order(boundary_on_device)
        return self._order_on if boundary_on_device else self._order_off

    @cached_property
    def _order_on(self) -> Order:
        return self._make_order(True)

    @cached_property
    def _order_off(self) -> Order:
        return self._make_order(False)

    def _make_order(self, boundary_on_device: bool) -> Order:
        workload, batch = self.model.workload, self.model.batch
        units = unit_order(workload)
        sizes = np.array([batch * nbytes for _, _, nbytes in units], dtype=np.float64)
        is_input = np.array([name == INPUT for _, name, _ in units], dtype=bool)
        saved = np.zeros((len(self.saved), len(units)), dtype=bool)
        position = {(block, name): i for i, (block, name, _) in enumerate(units)}
        for row, members in enumerate(self.saved):
            saved[row, [position[m] for m in members]] = True
        fixed_to = self.space.inputs
        if boundary_on_device and fixed_to == "auto":
            saved |= is_input
        leaves = fixed_to in ("host", "storage") or not boundary_on_device
        always = np.where(is_input & leaves, sizes, 0.0)
        swappable = saved | (is_input & leaves)
        ranks = np.cumsum(swappable, axis=1)[:, None, :]
        share = np.array(self.space.swapped_host_fractions)[None, :, None]
        to_host = swappable[:, None, :] & (np.floor(ranks * share) > np.floor((ranks - 1) * share))
        if fixed_to in ("host", "storage"):
            to_host = np.where(is_input, fixed_to == "host", to_host)
        kept = np.where(saved, sizes, 0.0)
        return Order(
            units,
            to_host,
            _cumulative(kept),
            _cumulative(np.where(to_host, kept[:, None, :], 0.0)),
            float(always.sum()),
            np.where(to_host, always, 0.0).sum(axis=2),
        )

    @cached_property
    def waiting(self) -> list[tuple[int, float]]:
        """The first axis: deferred blocks, and the share of them whose gradients wait in host memory."""
        pairs = []
        for count in self.space.deferred_blocks:
            pairs += [(count, share) for share in (self.space.grads_host_fractions if count else (0.0,))]
        return pairs

    @cached_property
    def waiting_grads(self) -> tuple[Floats, Floats]:
        """[waiting]: bytes of waiting gradients in host memory and on storage."""
        n_blocks = len(self.model.workload.blocks)
        host, stored = [], []
        for count, share in self.waiting:
            deferred = spread(n_blocks, count)
            inside = sum(self.model.grad_nbytes[i] for i in waiting_in_host(deferred, share))
            host.append(inside)
            stored.append(sum(self.model.grad_nbytes[i] for i in deferred) - inside)
        return np.array(host, dtype=np.float64), np.array(stored, dtype=np.float64)

    @cached_property
    def params_host(self) -> Floats:
        """[parameters]: bytes of parameters in host memory, by number of blocks."""
        return self.params_cum[self.params_counts]

    @cached_property
    def frozen_host(self) -> Floats:
        """[parameters]: of these, what no update writes."""
        return self._frozen_cum[self.params_counts]

    def params_stay(self, n_slots: int, budgets: Budgets) -> Floats:
        """[parameters]: 1 where there is a slot for every block that is not in host memory, so that no parameters have
        to be on storage: where slots are what storage is read into. (Without storage all state is in host memory.)"""
        rates, n_blocks = self.model.rates, len(self.params_cum) - 1
        if not rates.shares_host or rates.storage is None or budgets.storage_nbytes == 0:
            return np.zeros(len(self.params_counts))
        streamed = n_blocks - self.params_counts
        return ((streamed > 0) & (streamed <= n_slots)).astype(np.float64)

    def holds(self, shape: Shape, stay: Floats) -> Floats:
        """[waiting, parameters]: 1 where the update of one block can be held until backward has ended: its parameters
        have memory of their own, and there is a buffer for its gradients beside those of a block in backward and of one
        in an update."""
        n_blocks = len(self.params_cum) - 1
        if n_blocks < HOLDS_FROM_BLOCKS or self.model.rates.storage is None:
            return np.zeros((len(self.waiting), len(stay)))
        late = np.array([count for count, _ in self.waiting])
        buffers = shape.n_grad_buffers * np.where(self.model.grads_once(shape.micro_batches, late), 2, 1)
        at_home = (stay > 0) | (self.params_counts > spread_order(n_blocks).index(n_blocks - 2))
        found: Floats = (((late == 0) & (buffers > 2))[:, None] & at_home[None, :]).astype(np.float64)
        return found

    def _held_over_bus(self, shape: Shape, left: Floats) -> tuple[Floats, Floats]:
        """How many updates may give way to others, and the host memory that their gradients wait in: of what is `left`
        as `placement.held_updates` takes it, where all parameters have memory of their own and no update waits."""
        n_blocks, grad = len(self.model.slot_nbytes), max(self.model.grad_nbytes, default=0)
        n_streamed = self.model.n_streamed
        if self.model.rates.shares_host or not grad:
            return np.zeros_like(left), np.zeros_like(left)
        late = np.array([count for count, _ in self.waiting])
        per_buffer = np.where(self.model.grads_once(shape.micro_batches, late), 2, 1)[:, None, None, None]
        rows, columns = np.flatnonzero(late == 0), np.flatnonzero(self.params_counts == n_blocks)
        may, most = (
            np.ix_(rows, *map(np.arange, left.shape[1:3]), columns),
            -(-n_streamed // per_buffer[rows]),
        )
        n_buffers = np.zeros_like(left)
        n_buffers[may] = np.minimum(np.maximum(left[may], 0) // 2 // grad, most)
        return np.minimum(n_streamed, n_buffers * per_buffer), n_buffers * grad

    def host_nbytes(self, shape: Shape, staging_nbytes: int, activation_staging: int | None) -> int:
        """Host memory that this shape needs besides what lives there; the last two as `memory.host_need` has them."""
        model = self.model
        return host_need(
            model.workload,
            model.format,
            model.batch,
            shape,
            staging_nbytes=staging_nbytes,
            shares_host=model.rates.shares_host,
            has_storage=model.rates.storage is not None,
            activation_staging=activation_staging,
        )

    def kept_positions(self, order: Order, spare_nbytes: float, shape: Shape) -> npt.NDArray[np.int64]:
        """[saved set]: how many units, in order, stay on the device: all, or what leaves room for those that come back
        before they are used."""
        if not self.space.keeps_on_device or spare_nbytes < 0:
            return np.zeros(len(order.keepable), dtype=np.int64)
        room = np.where(
            order.keepable[:, -1] <= spare_nbytes, spare_nbytes, spare_nbytes - self.ahead_nbytes(shape)
        )
        return np.maximum(0, (order.keepable <= room[:, None]).sum(axis=1) - 1)

    def ahead_nbytes(self, shape: Shape) -> int:
        """Device memory of what comes back from storage before it is used."""
        model = self.model
        samples = samples_of_micro_batch(model.batch, shape.micro_batches)
        return read_ahead_nbytes(model.workload, samples, shares_host=model.rates.shares_host)

    def needs(self, shape: Shape, budgets: Budgets, sets: npt.NDArray[np.int64] | None = None) -> Needs:
        """Everything about every combination for one shape; of the saved sets only `sets`, where they are given."""
        model, order = self.model, self.order(shape.boundary_on_device)
        device = self.device_nbytes(shape)
        spare = budgets.device_nbytes - device
        rows = np.arange(len(self.saved)) if sets is None else sets
        kept_at = self.kept_positions(order, spare, shape)[rows]
        kept, keepable = order.keepable[rows, kept_at], order.keepable[rows, -1]
        cumulative = order.keepable_to_host
        in_host = cumulative[rows, :, -1] - cumulative[rows, :, kept_at] + order.always_to_host[rows]
        total = keepable + order.always_nbytes
        on_storage = np.maximum(0.0, (total - kept)[:, None] - in_host)
        grads_host, grads_stored = self.waiting_grads
        first = (slice(None), None, None, None)
        swapped_host, swapped_storage = in_host[None, :, :, None], on_storage[None, :, :, None]
        without, through_staging = (
            self.host_nbytes(shape, budgets.staging_nbytes, staging)
            for staging in (ACTIVATION_STAGING_NBYTES_MIN, None)
        )
        fixed = np.where(swapped_storage > 0, through_staging, without)
        least_host = fixed + grads_host[first] + swapped_host
        rest = budgets.host_memory_nbytes - least_host
        params, states, placed_fits = self._place(rest)
        held, held_nbytes = self._held_over_bus(shape, rest - params - states)
        root_states = np.minimum(states, self.root_states)
        stay = self.params_stay(shape.n_slots, budgets)
        load = Load(
            deferred_fraction=np.array([count / len(model.slot_nbytes) for count, _ in self.waiting])[first],
            params_host_nbytes=params,
            states_host_nbytes=states - root_states,
            root_states_host_nbytes=root_states,
            grads_spilled_nbytes=grads_stored[first],
            swapped_host_nbytes=swapped_host,
            swapped_storage_nbytes=swapped_storage,
            recompute_flops=(model.batch * self.candidates.recompute_flops[rows])[None, :, None, None],
            n_slots=shape.n_slots,
            micro_batches=shape.micro_batches,
            n_grad_buffers=shape.n_grad_buffers,
            boundary_on_device=shape.boundary_on_device,
            frozen_host_nbytes=self.frozen_host[None, None, None, :],
            params_stay=stay[None, None, None, :],
            held=held if not model.rates.shares_host else self.holds(shape, stay)[:, None, None, :],
        )
        storage = (1 - stay) * (self.params_cum[-1] - params) + (self.states_cum[-1] - states)
        if model.durable_steps:
            storage = 0.0 * storage + durable_nbytes(model.workload, model.format)
        storage = (
            storage + grads_stored[first] + swapped_storage + self._page_padding(shape, swapped_storage, rows)
        )
        fits = placed_fits & (storage <= storage_limit(self.hardware, budgets)) & (spare >= 0)
        ahead = np.where(on_storage > 0, self.ahead_nbytes(shape), 0.0)
        fits = fits & (kept[:, None] + ahead <= spare)[None, :, :, None]
        if self.space.activations == "keep":
            fits = fits & (kept >= keepable)[None, :, None, None]
        if budgets.written_nbytes_per_step is not None:
            written: Any = sum(t.written for t in model.traffic(load))
            # whole bytes, but a sum of parts of them
            padding = np.where(written > 0, budgets.written_padding_nbytes, 0)
            fits = fits & (np.rint(written) + padding <= budgets.written_nbytes_per_step)
        placed = params + states + held_nbytes
        return Needs(device, kept[:, None] + ahead, least_host, placed, storage, fits, load)

    def _page_padding(self, shape: Shape, swapped_storage: Floats, sets: npt.NDArray[np.int64]) -> Floats:
        """At most so many bytes more, since every tensor of a micro-batch lies on storage in whole pages."""
        n_tensors = self.candidates.counts[sets].sum(axis=1) + len(self.model.workload.blocks)
        padding: Floats = n_tensors[None, :, None, None] * float(shape.micro_batches * PAGE_NBYTES)
        return np.where(swapped_storage > 0, padding, 0.0)

    def _place(self, rest: Floats) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        """Bytes of parameters and of state in `rest` bytes of host memory, and whether they are to be had."""
        params = np.broadcast_to(
            self.params_host[None, None, None, :], (*rest.shape[:3], len(self.params_host))
        )
        left = rest - params
        if self.space.states_host_fraction is None:
            states = self.states_cum[np.maximum(0, np.searchsorted(self.states_cum, left, side="right") - 1)]
        else:
            wanted = self.space.states_host_fraction * self.states_cum[-1]
            at = int(np.searchsorted(self.states_cum, wanted, side="right")) - 1
            states = np.full_like(left, self.states_cum[at])
        return params, states, params + states <= rest


def _candidates(workload: Workload, space: Space) -> Candidates:
    """The saved sets to try."""
    if space.activations in ("save", "keep"):
        return everything(workload)
    found = candidates(workload)
    if space.activations != "recompute":
        return found
    only = slice(0, 1)
    return Candidates(
        found.classes, found.counts[only], found.saved_nbytes[only], found.recompute_flops[only]
    )


def waiting_in_host(deferred: list[int], fraction: float) -> list[int]:
    """The deferred blocks whose gradients wait in host memory."""
    return [deferred[i] for i in spread(len(deferred), int(fraction * len(deferred) + 1e-9))]


@lru_cache(maxsize=64)
def state_pieces(block_nbytes: tuple[int, ...], root_nbytes: int) -> tuple[tuple[int, int], ...]:
    """Optimizer state as pieces that host memory takes or leaves, in that order (`placement.state_order`): whose (the
    root's comes after the last block's), and bytes."""
    numbers = range(STATE_CHUNKS_PER_BLOCK)
    return tuple(
        state_order(
            [[_chunk(nbytes, number) for number in numbers] for nbytes in (*block_nbytes, root_nbytes)]
        )
    )


def _chunk(nbytes: int, number: int) -> int:
    """Piece `number` of STATE_CHUNKS_PER_BLOCK."""
    size = -(-nbytes // STATE_CHUNKS_PER_BLOCK)
    return max(0, min(size, nbytes - number * size))


def _cumulative(values: Floats) -> Floats:
    """Sums of the first 0, 1, 2, ... along the last axis."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return sums


def storage_limit(hardware: Hardware, budgets: Budgets) -> float:
    """Bytes that may lie on storage: the user's limit and the capacity of evenly striped drives."""
    if not hardware.drives:
        return 0.0
    limit = float("inf") if budgets.storage_nbytes is None else float(budgets.storage_nbytes)
    for drive in hardware.drives:
        if drive.capacity_nbytes is not None:
            limit = min(limit, float(len(hardware.drives) * drive.capacity_nbytes))
    return limit

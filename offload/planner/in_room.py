"""What backward keeps, swaps out and recomputes in a run whose state is placed already: plans within what is left.

[Note: block inputs come first] They cannot be computed again. Without a plan each takes the first of device, host
memory and storage that has room for it, in the order of forward. A plan spreads them over the blocks and gives them all
that the device and host memory have left before any other tensor has some of it, so that it never writes more to
storage than the run does without one. Only inputs ever go there.

[Note: what inputs away from the device take there] An input comes back whole, and the next one ahead of it, while the
working memory counts a micro-batch: room for two of them is left, where the root has not needed it already. But what
inputs have had in the first step, without a plan, they may have again: that step has shown that it goes. Where that is
more than is counted, nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from offload.errors import BudgetError
from offload.planner.activations import candidates, spread_order, unit_order
from offload.planner.cost_model import CostModel, Load
from offload.planner.hardware import Hardware
from offload.planner.memory import Shape, device_need
from offload.planner.plan import INPUT, Outcome, Plan
from offload.planner.points import TIE
from offload.planner.realise import predict
from offload.planner.tables import HOLDS_FROM_BLOCKS
from offload.planner.workload import Workload
from offload.types import PAGE_NBYTES


@dataclass(frozen=True)
class Room:
    """Memory that a run has left for what backward needs, in bytes of the whole batch."""

    device_nbytes: int
    """Beside what is placed there; what computes needs some of it."""
    device_unplanned_nbytes: int
    """What block inputs may have of that without a plan."""
    host_nbytes: int
    has_storage: bool
    host_inputs_nbytes: int = 0
    """Host memory besides, which only tensors as large as a block's input can have again."""
    held_nbytes: dict[str, int] = field(default_factory=dict)
    """By tier, what is placed there."""


@dataclass(frozen=True)
class _Filled:
    """Where activations wait for backward. Bytes as they are counted against the budgets."""

    outcomes: tuple[dict[str, Outcome], ...]
    device_left_nbytes: int
    host_left_nbytes: int
    reserve_nbytes: int = 0
    """On the device, for inputs that come back."""


def held_blocks(placed: Plan, *, has_storage: bool) -> tuple[int, ...]:
    """The block whose update such a run holds until backward has ended, where the device shares the host's memory
    (`Plan.held_blocks`)."""
    block, n_buffers = len(placed.params_in_host) - 2, placed.n_grad_buffers * placed.grads_per_buffer
    if not has_storage or placed.deferred_blocks or n_buffers <= 2 or block + 2 < HOLDS_FROM_BLOCKS:
        return ()
    at_home = placed.params_on_device or placed.params_in_host[block]
    return (block,) if at_home and (placed.durable_steps or placed.states_in_host[block] < 1) else ()


def plans_in_room(
    base: Plan, workload: Workload, hardware: Hardware, room: Room, inputs: Outcome | None = None
) -> list[Plan]:
    """Plans that differ from `base` in activations alone: the fastest by the formulas, the fastest of those that swap
    out nothing but block inputs, that which recomputes all it can, and what the run does without a plan. `inputs` says
    where block inputs wait, if the user has.

    None writes more to storage than the last. The others keep to `room`, but for [Note: what inputs away from the
    device take there]. Raises BudgetError where `room.device_nbytes` does not hold what computes.
    """
    return _InRoom(base, workload, hardware, room, inputs).plans()


class _InRoom:
    """One run: `base` says how its state is placed."""

    def __init__(
        self, base: Plan, workload: Workload, hardware: Hardware, room: Room, inputs: Outcome | None
    ) -> None:
        self._base, self._workload, self._room, self._fixed = base, workload, room, inputs
        self._shares_host = hardware.shares_host
        self._model = CostModel(
            workload,
            hardware,
            base.state_format,
            base.batch_samples,
            durable_steps=base.durable_steps,
        )
        shape = Shape(base.micro_batches, base.n_slots, base.n_grad_buffers, base.boundary_on_device)
        need = device_need(
            workload, base.state_format, base.batch_samples, shape, shares_host=hardware.shares_host
        )
        self._root_nbytes = need.logits  # beside what blocks compute with, and never at the same time
        self._working_nbytes = need.working + need.boundary + need.logits
        self._device_nbytes = room.device_nbytes - self._working_nbytes
        if self._device_nbytes < 0:
            raise BudgetError(
                f"computing takes {self._working_nbytes / 1e9:.3g} GB beside parameters and gradients, and "
                f"{room.device_nbytes / 1e9:.3g} GB of device_memory are left for it"
            )

    def plans(self) -> list[Plan]:
        """See `plans_in_room`."""
        unplanned, recomputed = self._plan(self._unplanned), self._plan(self._inputs)
        swapping = self._best(recomputed, self._inputs.host_left_nbytes)
        return [swapping, self._best(recomputed, 0), recomputed, unplanned]

    def _best(self, recomputed: Plan, host_nbytes: int) -> Plan:
        best = recomputed
        for filled in self._saving(host_nbytes):
            found = self._plan(filled)
            if _step_s(found) < _step_s(best) * (1 - TIE):
                best = found
        return best

    # ---- where activations wait ------------------------------------------------------------------------------

    @cached_property
    def _input_nbytes(self) -> list[int]:
        """Of the whole batch, by block."""
        return [self._base.batch_samples * block.input_nbytes_per_sample for block in self._workload.blocks]

    def _in_host(self, nbytes: int, n_tensors: int = 1) -> int:
        """Bytes of host memory for so many tensors: on a device with memory of its own each takes whole pages."""
        return nbytes if self._shares_host else nbytes + n_tensors * PAGE_NBYTES

    @cached_property
    def _unplanned(self) -> _Filled:
        """In the order of forward, each where there is room first."""
        return self._fill_inputs(range(len(self._input_nbytes)), self._room.device_unplanned_nbytes)

    @cached_property
    def _inputs(self) -> _Filled:
        """Spread over the blocks. See [Note: block inputs come first]."""
        unplanned, order = self._unplanned, spread_order(len(self._input_nbytes))
        filled, reserve_nbytes = self._fill_inputs(order, self._device_nbytes), 0
        if self._returns(filled):
            reserve_nbytes = max(0, 2 * max(self._input_nbytes) - self._root_nbytes)
            shown_nbytes = self._room.device_unplanned_nbytes - unplanned.device_left_nbytes
            filled = self._fill_inputs(order, max(self._device_nbytes - reserve_nbytes, shown_nbytes))
        if self._nbytes(filled, "storage") > self._nbytes(unplanned, "storage"):
            filled = unplanned
        left_nbytes = self._device_nbytes - reserve_nbytes - self._nbytes(filled, "device")
        host_left_nbytes = filled.host_left_nbytes if left_nbytes >= 0 else 0
        return _Filled(filled.outcomes, max(0, left_nbytes), host_left_nbytes, reserve_nbytes)

    def _fill_inputs(self, order: Iterator[int] | range | list[int], device_nbytes: int) -> _Filled:
        """Device, host memory and storage filled in this order, or all inputs where the user wants them."""
        outcomes: list[dict[str, Outcome]] = [{} for _ in self._input_nbytes]
        host_nbytes = self._room.host_nbytes + self._room.host_inputs_nbytes
        for block in order:
            nbytes = self._input_nbytes[block]
            outcome: Outcome = "storage"
            if self._fixed is not None:
                outcome = self._fixed
            elif nbytes <= device_nbytes:
                outcome = "device"
            elif self._in_host(nbytes) <= host_nbytes or not self._room.has_storage:
                outcome = "host"
            outcomes[block][INPUT] = outcome
            device_nbytes -= nbytes * (outcome == "device")
            host_nbytes -= self._in_host(nbytes) * (outcome == "host")
        host_nbytes = max(0, min(host_nbytes, self._room.host_nbytes))
        return _Filled(tuple(outcomes), device_nbytes, host_nbytes)

    def _returns(self, filled: _Filled) -> bool:
        """Whether any input comes back to the device."""
        away = {outcomes[INPUT] for outcomes in filled.outcomes} - {"device"}
        return "storage" in away or (bool(away) and not self._shares_host)

    def _saving(self, host_nbytes: int) -> Iterator[_Filled]:
        """Beside the inputs, every set of saved tensors that the device and so much host memory have room for."""
        found, units, samples = (
            candidates(self._workload),
            unit_order(self._workload),
            self._base.batch_samples,
        )
        left_nbytes = self._inputs.device_left_nbytes + host_nbytes
        for candidate, saved_nbytes in enumerate(found.saved_nbytes):
            if 0 < samples * saved_nbytes <= left_nbytes:
                filled = self._fill_saved(found.members(candidate), units, host_nbytes)
                if filled is not None:
                    yield filled

    def _fill_saved(
        self, saved: set[tuple[int, str]], units: list[tuple[int, str, int]], host_nbytes: int
    ) -> _Filled | None:
        """In the order in which saved tensors are kept, each where there is room first; None without room for one."""
        outcomes = [dict(of_block) for of_block in self._inputs.outcomes]
        device_nbytes = self._inputs.device_left_nbytes
        for block, name, per_sample in units:
            if (block, name) not in saved:
                continue
            nbytes = self._base.batch_samples * per_sample
            in_host = self._in_host(nbytes, self._base.micro_batches)
            if nbytes <= device_nbytes:
                outcomes[block][name], device_nbytes = "device", device_nbytes - nbytes
            elif in_host <= host_nbytes:
                outcomes[block][name], host_nbytes = "host", host_nbytes - in_host
            else:
                return None
        return _Filled(tuple(outcomes), device_nbytes, host_nbytes, self._inputs.reserve_nbytes)

    # ---- as plans --------------------------------------------------------------------------------------------

    def _nbytes(self, filled: _Filled, tier: Outcome) -> int:
        """Of what waits in a tier."""
        return self._base.batch_samples * sum(
            nbytes
            for block, outcomes in zip(self._workload.blocks, filled.outcomes, strict=True)
            for name, nbytes in block.nbytes_by_tensor().items()
            if outcomes.get(name) == tier
        )

    def _plan(self, filled: _Filled) -> Plan:
        """`base` with these activations, and what is expected of it."""
        outcomes: tuple[dict[str, Outcome], ...] = tuple(
            {name: of_block.get(name, "recompute") for name in block.nbytes_by_tensor()}
            for block, of_block in zip(self._workload.blocks, filled.outcomes, strict=True)
        )
        swapped: dict[str, int] = {
            "host": self._nbytes(filled, "host"),
            "storage": self._nbytes(filled, "storage"),
        }
        on_device = self._working_nbytes + self._nbytes(filled, "device") + filled.reserve_nbytes
        peaks = {
            tier: self._room.held_nbytes.get(tier, 0) + nbytes
            for tier, nbytes in {"device": on_device, **swapped}.items()
        }
        return self._base.model_copy(
            update={
                "activations": outcomes,
                "activations_host_nbytes": swapped["host"],
                "predicted": predict(self._model, self._load(outcomes, swapped), peaks),
            }
        )

    def _load(self, outcomes: tuple[dict[str, Outcome], ...], swapped: dict[str, int]) -> Load:
        base, model, blocks = self._base, self._model, self._workload.blocks
        numels = [block.stored_numel for block in blocks]
        recomputed = sum(
            tensor.recompute_flops_per_sample
            for block, of_block in zip(blocks, outcomes, strict=True)
            for tensor in block.saved
            if of_block[tensor.name] == "recompute"
        )
        return Load(
            deferred_fraction=len(base.deferred_blocks) / len(blocks),
            params_host_nbytes=sum(
                n for n, inside in zip(model.slot_nbytes, base.params_in_host, strict=True) if inside
            ),
            states_host_nbytes=sum(base.state_in_host_nbytes(i, numel) for i, numel in enumerate(numels)),
            root_states_host_nbytes=base.state_in_host_nbytes(-1, self._workload.root_stored_numel),
            grads_spilled_nbytes=sum(
                model.grad_nbytes[i] for i in base.deferred_blocks if not base.grads_in_host[i]
            ),
            swapped_host_nbytes=float(swapped["host"]),
            swapped_storage_nbytes=float(swapped["storage"]),
            recompute_flops=base.batch_samples * recomputed,
            micro_batches=base.micro_batches,
            n_slots=base.n_slots,
            n_grad_buffers=base.n_grad_buffers,
            boundary_on_device=base.boundary_on_device,
            frozen_host_nbytes=model.format.param_nbytes
            * sum(b.frozen_numel for b, inside in zip(blocks, base.params_in_host, strict=True) if inside),
            params_stay=float(base.params_on_device),
            held=float(len(base.held_blocks)),
        )


def _step_s(plan: Plan) -> float:
    return plan.predicted.step_s if plan.predicted is not None else float("inf")

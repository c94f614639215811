"""Seconds of a step from bytes and FLOPs: pure arithmetic on numbers or numpy arrays. Formulas: docs/planner.md.

A step is a forward phase, a backward phase and a tail that nothing hides. Each phase lasts as long as its busiest
resource, or a little longer where a second one is nearly as busy. Placement counts as spread evenly over the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from offload.planner.hardware import Hardware
from offload.planner.overlap import OVERLAP_ORDER, overlapped
from offload.planner.placement import HOST_SLOTS
from offload.planner.plan import GRAD_ONCE_NBYTES, StateFormat
from offload.planner.rates import Rates, rates_of
from offload.planner.workload import Workload
from offload.types import GRAD_PARTS, ROOT_PARTS
from offload.update_rules import ADAMW

UNFUSED = 8
"""Times the fused AdamW's seconds: a device's update in torch's operations (optim/torch_rules.py)."""
RESOURCES = ("compute", "bus", "storage", "dram", "cpu")


@dataclass(frozen=True)
class Traffic:
    """What a phase asks of each resource: FLOPs, bytes, updated parameters."""

    flops: Any
    """In FLOPs of a matrix product: other work counts by how much longer it takes (`Rates.slowness`)."""
    h2d: Any
    d2h: Any
    read: Any
    written: Any
    updated: Any

    def dram(self, update_dram_nbytes: float, shares_host: bool) -> Any:
        """Bytes through DRAM: a transfer touches it once, a copy inside it twice, an update its state and gradient."""
        copies = 2 if shares_host else 1
        bus = copies * (self.h2d + self.d2h)
        return self.read + self.written + bus + update_dram_nbytes * self.updated


@dataclass(frozen=True)
class Load:
    """What a choice of plan leaves to be moved and computed. Bytes are of the whole batch and all blocks; every field
    may be a numpy array. What sets the working memory is plain numbers, but for a lower bound (planner/bounds.py)."""

    deferred_fraction: Any
    params_host_nbytes: Any
    states_host_nbytes: Any
    root_states_host_nbytes: Any
    grads_spilled_nbytes: Any
    swapped_host_nbytes: Any
    swapped_storage_nbytes: Any
    recompute_flops: Any
    micro_batches: Any
    n_slots: Any
    n_grad_buffers: Any
    boundary_on_device: bool
    frozen_host_nbytes: Any = 0.0
    """Of `params_host_nbytes`, what no update writes."""
    params_stay: Any = 0.0
    """1: parameters that are not in host memory stay in device memory, and are never on storage."""
    held: Any = 0.0
    """How many updates may be made in the next forward (`Plan.held_blocks`)."""
    serial_update: bool = False
    """The update's read, arithmetic and write follow each other instead of overlapping."""

    def at(self, index: tuple[int, ...], shape: tuple[int, ...]) -> Load:
        """One combination out of a load whose fields broadcast to `shape`."""

        def one(value: Any) -> Any:
            return float(np.broadcast_to(value, shape)[index]) if isinstance(value, np.ndarray) else value

        values: dict[str, Any] = {name: one(value) for name, value in vars(self).items()}
        return Load(**values)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step and where they come from."""

    step_s: Any
    forward_s: Any
    backward_s: Any
    tail_s: Any
    lower_bound_s: Any
    forward: dict[str, Any]
    backward: dict[str, Any]
    exposed: dict[str, Any]
    """Seconds that the device waits or works beside its FLOPs: `update` (one block's, at the turn to forward),
    `gradient` (on their way out of the only buffer), `launch`, `device_update` (of state that stays on the device)."""
    traffic: tuple[Traffic, Traffic, Traffic]
    """Of forward, backward and tail."""


def device_update_s(workload: Workload, hardware: Hardware) -> float:
    """Updates of what stays on the device, all of them; 0 where it is not known how fast its memory is."""
    rate = hardware.device_adam_params_per_s
    if not rate:
        return 0.0
    return workload.on_device_numel / rate * (1 if workload.rule == ADAMW else UNFUSED)


class CostModel:
    """One workload and batch on one machine with one format of state."""

    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        state_format: StateFormat,
        batch_samples: int,
        overlap_order: float = OVERLAP_ORDER,
        durable_steps: bool = False,
    ) -> None:
        self.durable_steps = durable_steps
        self.overlap_order = overlap_order
        self.workload = workload
        self.hardware = hardware
        self.format = state_format
        self.batch = batch_samples
        self.rates: Rates = rates_of(hardware, workload.param_nbytes, workload.rule)
        self.device_update_s = device_update_s(workload, hardware)

    # ---- totals of the workload ------------------------------------------------------------------------------

    @cached_property
    def trainable(self) -> int:
        """Trainable parameters in blocks."""
        return sum(b.stored_numel for b in self.workload.blocks)

    @cached_property
    def frozen(self) -> int:
        """Frozen parameters in blocks."""
        return sum(b.frozen_numel for b in self.workload.blocks)

    @cached_property
    def n_streamed(self) -> int:
        """Blocks whose parameters do not stay on the device for good; 1 at least."""
        return max(1, sum(nbytes > 0 for nbytes in self.slot_nbytes))

    @cached_property
    def slot_nbytes(self) -> tuple[int, ...]:
        """Parameters of each block."""
        width = self.format.param_nbytes
        return tuple(width * (b.stored_numel + b.frozen_numel) for b in self.workload.blocks)

    @cached_property
    def grad_nbytes(self) -> tuple[int, ...]:
        """Gradients of each block."""
        return tuple(self.format.grad_nbytes * b.stored_numel for b in self.workload.blocks)

    @cached_property
    def state_nbytes(self) -> tuple[int, ...]:
        """Optimizer state of each block, without the parameter."""
        return tuple(self.format.state_of(b.stored_numel) for b in self.workload.blocks)

    @cached_property
    def input_nbytes(self) -> int:
        """Inputs of all blocks, whole batch."""
        return self.batch * sum(b.input_nbytes_per_sample for b in self.workload.blocks)

    @cached_property
    def update_dram_nbytes(self) -> float:
        """DRAM bytes of one parameter's update: state in and out, parameter in (where needed) and out, gradient in."""
        f = self.format
        return 2 * f.state_nbytes + f.param_nbytes * (1 + f.update_reads_param) + f.grad_nbytes

    @cached_property
    def forward_flops(self) -> float:
        """One batch forward, root included."""
        return self.batch * (
            sum(b.flops_per_sample for b in self.workload.blocks) + self.workload.root_flops_per_sample
        )

    @cached_property
    def backward_flops(self) -> float:
        """One batch backward without recomputation: gradients by input, and by weight where weights train."""
        total = 2 * self.workload.root_flops_per_sample
        for block in self.workload.blocks:
            numel = block.trainable_numel + block.frozen_numel
            total += block.flops_per_sample * (1 + (block.trainable_numel / numel if numel else 1))
        return self.batch * total

    @cached_property
    def forward_work(self) -> float:
        """`forward_flops` in FLOPs of a matrix product."""
        blocks = sum(b.flops_per_sample for b in self.workload.blocks)
        root = self.workload.root_flops_per_sample
        return self.batch * (
            blocks * self.rates.slowness("forward") + root * self.rates.slowness("root_forward")
        )

    @cached_property
    def backward_work(self) -> float:
        """`backward_flops` in FLOPs of a matrix product."""
        root = 2 * self.batch * self.workload.root_flops_per_sample
        return self.blocks_backward_work + root * self.rates.slowness("root_backward")

    @cached_property
    def blocks_backward_work(self) -> float:
        """The same of the blocks alone."""
        root = 2 * self.batch * self.workload.root_flops_per_sample
        return (self.backward_flops - root) * self.rates.slowness("backward")

    @cached_property
    def replayed_work(self) -> float:
        """What recomputing takes besides products, in FLOPs of them, however few of these are made again."""
        blocks = self.batch * sum(b.flops_per_sample for b in self.workload.blocks)
        return self.rates.flops_per_s * float(self.rates.seconds_beside_products("recompute", blocks))

    # ---- what a choice makes of gradients and parameters -------------------------------------------------------

    @cached_property
    def may_have_grads_once(self) -> bool:
        """Whether gradients can stay bf16, as they come (`Plan.grads_once`)."""
        f = self.format
        return f.param_nbytes == GRAD_ONCE_NBYTES < f.grad_nbytes and self.workload.one_dtype

    def grads_once(self, micro_batches: Any, deferred_fraction: Any) -> Any:
        """Where they do: nothing is added up, and nothing waits."""
        at_once = np.logical_and(self.may_have_grads_once, np.equal(micro_batches, 1))
        return np.logical_and(at_once, np.equal(deferred_fraction, 0))

    def grads_nbytes(self, load: Load) -> Any:
        """Gradients of all blocks, as they leave the device."""
        once = self.grads_once(load.micro_batches, load.deferred_fraction)
        return sum(self.grad_nbytes) * np.where(once, GRAD_ONCE_NBYTES / self.format.grad_nbytes, 1.0)

    def _params_stored(self, load: Load) -> tuple[Any, Any]:
        """Bytes of trainable and of frozen parameters on storage. Which blocks' are there decides how many of them an
        update writes: where frozen blocks are among the others, the share of all parameters does not tell."""
        frozen = self.format.param_nbytes * self.frozen
        trained_host = load.params_host_nbytes - load.frozen_host_nbytes
        trained = sum(self.slot_nbytes) - frozen - trained_host
        return np.where(load.params_stay, 0.0, trained), np.where(
            load.params_stay, 0.0, frozen - load.frozen_host_nbytes
        )

    # ---- traffic ---------------------------------------------------------------------------------------------

    def traffic(self, load: Load) -> tuple[Traffic, Traffic, Traffic]:
        """Forward, backward and tail of a step."""
        f, n_blocks = self.format, self.n_streamed
        late, early = load.deferred_fraction, 1 - load.deferred_fraction
        on_bus = 0 if self.rates.shares_host else 1
        params = sum(self.slot_nbytes)
        trained_stored, frozen_stored = self._params_stored(load)
        params_stored = trained_stored + frozen_stored
        stored = params_stored / max(1, params)
        grads = self.grads_nbytes(load)
        trainable_params = f.param_nbytes * self.trainable
        states = sum(self.state_nbytes) - load.states_host_nbytes
        streamed = n_blocks * stored if self.rates.shares_host else n_blocks
        loaded = 1 - np.minimum(1.0, load.n_slots / np.maximum(streamed, 1e-9))
        """Blocks in slots at a turn are not loaded again. Where the device computes in host memory, those whose
        parameters live there need no slot."""
        fetched = fetched_forward = loaded
        if not self.rates.shares_host:
            fetched = fetched_forward = 1 - np.minimum(1.0, HOST_SLOTS / np.maximum(n_blocks * stored, 1e-9))
            # With a slot for each the device gets them back from updates, which read them for themselves.
            stay = np.logical_and(np.greater_equal(load.n_slots, n_blocks), np.equal(late, 0))
            fetched, fetched_forward = np.where(stay, 1.0, fetched), np.where(stay, 0.0, fetched_forward)
        late_params = frozen_stored + (trained_stored if f.update_reads_param else 0)
        boundary = 0 if load.boundary_on_device else self.input_nbytes
        swapped = load.swapped_host_nbytes + load.swapped_storage_nbytes
        copied = load.swapped_storage_nbytes if self.rates.shares_host else swapped
        waiting = late * sum(self.grad_nbytes) - load.grads_spilled_nbytes if self.rates.shares_host else 0
        written_back = trained_stored + states
        held_back = states
        if self.durable_steps:
            written_back = held_back = trainable_params + sum(self.state_nbytes)
        held = early * load.held / n_blocks if self.rates.shares_host else 0.0
        """The share of the state that the held update moves in the next forward. Over a bus: see `_spread`."""
        root = self.workload.root_stored_numel
        root_states = f.state_of(root) - load.root_states_host_nbytes
        root_back = f.stored_of(root) if self.durable_steps else root_states
        head = np.where(late >= 1, 0.0, self.workload.early_numel / max(1, root))
        """The share of the root that is updated while the blocks go backward."""
        forward = Traffic(
            flops=self.forward_work,
            h2d=on_bus * (params + boundary),
            d2h=copied,
            read=early * params_stored * fetched_forward
            + late * (late_params * fetched_forward + states)
            + self.workload.stored_grad_reads * load.grads_spilled_nbytes
            + held * states,
            written=load.swapped_storage_nbytes + late * written_back + held * held_back,
            updated=late * self.trainable,
        )
        backward = Traffic(
            flops=self.backward_work + load.recompute_flops + self.replayed_work,
            h2d=on_bus * (params * loaded + boundary) + copied,
            d2h=on_bus * (grads + boundary + f.grad_nbytes * head * root) + waiting,
            read=params_stored * fetched
            + load.swapped_storage_nbytes
            + (early - held) * states
            + head * root_states,
            written=early * written_back - held * held_back + load.grads_spilled_nbytes + head * root_back,
            updated=early * self.trainable + head * root,
        )
        rest, rest_states = (1 - head) * root, (1 - head) * root_states
        rest_back = (1 - head) * root_back
        tail = Traffic(
            flops=0.0,
            h2d=on_bus * f.param_nbytes * self.workload.root_stored_numel,
            d2h=on_bus * f.grad_nbytes * rest,
            read=rest_states,
            written=rest_back,
            updated=rest,
        )
        return forward, backward, tail

    def seconds(self, traffic: Traffic) -> dict[str, Any]:
        """Each resource's time for `traffic` as if it were alone."""
        rates = self.rates
        storage: Any = 0.0 * (traffic.read + traffic.written)
        if rates.storage is not None:
            storage = rates.storage.seconds(traffic.read, traffic.written)
        return {
            "compute": traffic.flops / rates.flops_per_s,
            "bus": rates.bus.seconds(traffic.h2d, traffic.d2h),
            "storage": storage,
            "dram": traffic.dram(self.update_dram_nbytes, rates.shares_host) / rates.dram_bytes_per_s,
            "cpu": traffic.updated / rates.update_params_per_s,
        }

    def phase_s(self, seconds: dict[str, Any], load: Load, exposed_s: Any) -> Any:
        """Duration of a phase: its busiest resource, with what this choice does not overlap added up. `exposed_s` is
        what the device waits for or does beside its FLOPs."""
        compute, storage, bus = seconds["compute"], seconds["storage"], seconds["bus"]
        if self.rates.shares_host:
            exposed_s, bus = exposed_s + bus, 0.0  # the thread that computes makes the copies
            storage = self.rates.slowed_storage_s(storage, compute)
            compute = self.rates.shared_cores_s(compute, seconds["cpu"], seconds["storage"])
        busy = [compute + exposed_s, bus, seconds["dram"]]
        if load.serial_update:
            busy.append(storage + seconds["cpu"])
        else:
            busy += [storage, seconds["cpu"]]
        return overlapped(busy, self.overlap_order)

    def cost(self, load: Load) -> Cost:
        """Seconds of a step under `load`."""
        forward_traffic, backward_traffic, tail_traffic = self.traffic(load)
        forward, backward = self.seconds(forward_traffic), self.seconds(backward_traffic)
        if not self.rates.shares_host:
            forward_traffic, backward_traffic = self._spread(
                load, forward_traffic, backward_traffic, backward
            )
            forward, backward = self.seconds(forward_traffic), self.seconds(backward_traffic)
        tail = self.seconds(tail_traffic)
        one_update_s, gradient_s, launches_s = self.exposed_s(load, backward)
        forward_s = self.phase_s(forward, load, launches_s + load.deferred_fraction * one_update_s)
        early_update_s = (1 - load.deferred_fraction) * one_update_s
        beside_s = early_update_s + gradient_s + launches_s + self.device_update_s
        backward_s = self.phase_s(backward, load, beside_s)
        tail_s = self.tail_s(load, tail_traffic, tail)
        whole = [forward[name] + backward[name] + tail[name] for name in RESOURCES]
        lower_bound = whole[0]
        for value in whole[1:]:
            lower_bound = np.maximum(lower_bound, value)
        return Cost(
            step_s=forward_s + backward_s + tail_s,
            forward_s=forward_s,
            backward_s=backward_s,
            tail_s=tail_s,
            lower_bound_s=lower_bound,
            forward=forward,
            backward=backward,
            exposed={
                "update": one_update_s,
                "gradient": gradient_s,
                "launch": 2 * launches_s,
                "device_update": self.device_update_s,
            },
            traffic=(forward_traffic, backward_traffic, tail_traffic),
        )

    def exposed_s(self, load: Load, backward: dict[str, Any]) -> tuple[Any, Any, Any]:
        """What the device waits for beside its FLOPs: one block's update, gradients on their way out, and the launches
        of one direction."""
        n_blocks = max(1, len(self.workload.blocks))
        one_update_s: Any = self._one_update_s(load) if self.workload.blocks else 0.0
        n_first = n_blocks - self.n_streamed  # their backward comes after it, and asks for nothing else
        one_update_s = np.maximum(0.0, one_update_s - backward["compute"] * n_first / n_blocks)
        once = self.grads_once(load.micro_batches, load.deferred_fraction)
        gradient_s: Any = np.where(
            load.n_grad_buffers * np.where(once, 2, 1) < 2,
            np.maximum(backward["storage"], backward["cpu"])
            if self.rates.shares_host
            else self._leaving_s(load),
            0.0,
        )
        launches_s = n_blocks * load.micro_batches * self.hardware.launch_overhead_s
        return one_update_s, gradient_s, launches_s

    def tail_s(self, load: Load, tail_traffic: Traffic, tail: dict[str, Any]) -> Any:
        """What comes after backward and before the next forward; `tail` are the seconds of its traffic."""
        stages = (
            tail_traffic.d2h / self.rates.bus.d2h,
            np.maximum(tail["storage"], tail["cpu"]),
            tail_traffic.h2d / self.rates.bus.h2d,
        )
        longest = np.maximum(np.maximum(stages[0], stages[1]), stages[2])
        n_parts: Any = 1.0
        if not load.serial_update and not self.workload.rule.whole_gradients:
            rest = tail_traffic.updated / max(1, self.workload.root_stored_numel)
            n_parts = np.maximum(1.0, ROOT_PARTS * rest)
        return longest + (sum(stages) - longest) / n_parts + self.hardware.step_overhead_s

    def _leaving_s(self, load: Load) -> Any:
        """What the device waits for gradients to leave its only buffer. A block's leave in parts while its last
        micro-batch computes them, and the next block's first computes each behind the part that has left."""
        copied_s = self.grads_nbytes(load) / self.rates.bus.d2h
        recomputed = load.recompute_flops + self.replayed_work
        hidden = (2 * (1 - 1 / GRAD_PARTS) * self.blocks_backward_work + recomputed) / load.micro_batches
        return np.maximum(0.0, copied_s - hidden / self.rates.flops_per_s) * (1 - 1 / self.n_streamed)

    def _spread(
        self, load: Load, forward: Traffic, backward: Traffic, backward_s: dict[str, Any]
    ) -> tuple[Traffic, Traffic]:
        """Of updates that may give way, as much in the next forward as would make backward longer than its compute."""
        updates = self.early_updates(load)
        updates_s = self.seconds(updates)
        share: Any = 0.0
        for name in ("storage", "cpu", "dram"):
            excess_s = np.maximum(0.0, backward_s[name] - backward_s["compute"])
            share = np.maximum(share, excess_s / np.maximum(updates_s[name], 1e-12))
        share = np.minimum(share, load.held / self.n_streamed)
        moved = {name: share * getattr(updates, name) for name in ("read", "written", "updated")}
        return (
            replace(forward, **{name: getattr(forward, name) + value for name, value in moved.items()}),
            replace(backward, **{name: getattr(backward, name) - value for name, value in moved.items()}),
        )

    def early_updates(self, load: Load) -> Traffic:
        """Of the blocks, those that are made during backward where none gives way."""
        early = 1 - load.deferred_fraction
        states = sum(self.state_nbytes) - load.states_host_nbytes
        back = states
        if self.durable_steps:
            back = self.format.param_nbytes * self.trainable + sum(self.state_nbytes)
        return Traffic(0.0, 0.0, 0.0, early * states, early * back, early * self.trainable)

    def _one_update_s(self, load: Load) -> Any:
        """One block's update from its gradients to its new parameters. The next forward waits for that of the block
        which backward leaves last, and whose state host memory takes before others'; with deferred updates the first
        block waits for its own."""
        n_blocks = self.n_streamed
        first_nbytes = next((nbytes for nbytes in self.state_nbytes if nbytes), 0)
        states = np.maximum(0.0, first_nbytes - load.states_host_nbytes)
        read_s: Any = 0.0
        if self.rates.storage is not None:
            read_s = states / self.rates.storage.read
        bus_s = 0.0
        if not self.rates.shares_host:
            bus_s = self.grads_nbytes(load) / n_blocks / self.rates.bus.d2h
        return bus_s + np.maximum(read_s, self.trainable / n_blocks / self.rates.update_params_per_s)

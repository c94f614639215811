"""Where the training state of a run goes: first what stays on the device, then the rest by budget or as a plan says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from offload.config import Config, parse_budget
from offload.errors import BudgetError, ConfigError
from offload.planner.placement import BlockBytes, LeastDevice, Placement, place
from offload.planner.plan import Plan
from offload.planner.states_on_device import (
    OnDevice,
    blocks_max,
    fill_device,
    most_to_ask_for,
    of_plan,
    streamed,
    with_device_states,
)
from offload.runtime.planning import placement_of
from offload.tiers.device import DeviceTier
from offload.update_rules import UpdateRule

logger = logging.getLogger("offload")

SLOTS = 4
"""Of device memory, what a run without a plan has before optimizer state stays there."""


def may_stay(config: Config, device: DeviceTier, rule: UpdateRule) -> bool:
    """Whether optimizer state may stay on the device. Raises ConfigError where it cannot though it is asked for."""
    reason = None
    if device.shares_host:
        reason = "this run computes in host memory, where all state can be"
    elif config.durability == "step":
        reason = "durability='step' keeps every step on storage"
    elif not rule.made_on_device:
        reason = f"a device updates with AdamW, Adam, SGD and Lion on fp32 moments, this optimizer is {rule.described}"
    asked = asked_nbytes(config, 1 << 62)
    if reason is None:
        return asked is None or asked > 0
    if asked:
        raise ConfigError(f"states_on_device={config.states_on_device!r}: {reason}; leave it at 'auto'")
    return False


def asked_nbytes(config: Config, device_nbytes: int) -> int | None:
    """Device memory that the user wants to be for such state; None: "auto"."""
    asked = config.states_on_device
    return None if asked == "auto" else parse_budget(asked, device_nbytes)


def _by_budget(
    config: Config, device: DeviceTier, blocks: Sequence[BlockBytes], root: BlockBytes, device_nbytes: int
) -> OnDevice:
    """As asked; else, where the device's memory is the faster one, of what a run without a plan has for parameters and
    gradients all but some slots."""
    more_nbytes = asked_nbytes(config, device_nbytes)
    if more_nbytes is None:
        if not device.updates_faster:
            return OnDevice()
        n_slots = SLOTS if config.prefetch_blocks is None else min(config.prefetch_blocks + 1, len(blocks))
        slot, grad = max(b.slot_nbytes for b in blocks), max(b.grad_nbytes for b in blocks)
        fixed = root.slot_nbytes + root.grad_nbytes
        more_nbytes = device_nbytes // 2 - fixed - n_slots * slot - 2 * grad
    return fill_device(blocks, root, more_nbytes, keeps_gradients=config.deferred)


def _all(
    config: Config, device: DeviceTier, rule: UpdateRule, root: BlockBytes, device_nbytes: int
) -> OnDevice:
    """Of a model without blocks to stream. Raises where the device cannot update it, or has no room for it."""
    if not rule.made_on_device:
        raise ConfigError(
            f"this model has no blocks to stream, and a {device.torch_device.type} device updates with AdamW, Adam, "
            f"SGD and Lion on fp32 moments only; this optimizer is {rule.described}: use one of them, or device='cpu'"
        )
    stays = OnDevice(root=True)
    needed_nbytes = stays.nbytes([], root, keeps_gradients=False)
    if needed_nbytes > device_nbytes:
        instead = (
            "leave step_aside at 'auto'"
            if config.step_aside == "always"
            else "name blocks to stream (`blocks`)"
        )
        raise BudgetError(
            f"does not fit: nothing is streamed, and parameters, gradients and optimizer state take {needed_nbytes} "
            f"bytes of device memory; device_memory allows {device_nbytes}. Smallest that would do: "
            f"device_memory='{needed_nbytes + device.own_nbytes}' (bytes); or {instead}"
        )
    return stays


def place_run(
    blocks: list[BlockBytes],
    root: BlockBytes,
    config: Config,
    device: DeviceTier,
    rule: UpdateRule,
    plan: Plan | None,
    *,
    device_nbytes: int,
    grads_per_buffer: int,
    **budgets: Any,
) -> Placement:
    """The placement of a run that streams `blocks`; `budgets` as `place` has them.

    Raises BudgetError, before anything has moved, where it cannot fit, and ConfigError where `states_on_device` or the
    plan asks for what cannot be done.
    """
    stays = OnDevice()
    if not blocks and not device.shares_host:
        stays = _all(config, device, rule, root, device_nbytes)
    elif blocks and may_stay(config, device, rule):
        if plan is None:
            stays = _by_budget(config, device, blocks, root, device_nbytes)
        else:
            stays = of_plan(plan)
            most = blocks_max([b.grad_nbytes for b in blocks])
            if stays.n_blocks > most:
                raise ConfigError(
                    f"the plan keeps the optimizer state of {stays.n_blocks} blocks in device memory, of this model "
                    f"that of at most {most} can: plan again"
                )
    elif plan is not None and of_plan(plan):
        raise ConfigError(
            "the plan keeps optimizer state in device memory, which this run's device, optimizer, durability or "
            "states_on_device does not allow: plan again"
        )
    waits = config.deferred or (plan is not None and bool(plan.deferred_blocks))
    nbytes = stays.nbytes(blocks, root, keeps_gradients=waits)
    rest, rest_root = streamed(blocks, root, stays)
    budgets |= {
        "device_nbytes": device_nbytes - nbytes,
        "shares_host": device.shares_host,
        "device_own_nbytes": device.own_nbytes,
        "staying_nbytes": nbytes,
    }
    try:
        if plan is not None and blocks:
            placed = placement_of(_of_streamed(plan), rest, rest_root, **budgets)
        else:
            placed = place(
                rest,
                rest_root,
                **budgets,
                deferred=config.deferred,
                prefetch_blocks=config.prefetch_blocks,
                grads_per_buffer=grads_per_buffer,
                inputs_wait_in=config.activations,
                computes_nbytes=None if asked_nbytes(config, 0) is not None else -(-device_nbytes // 2),
            )
    except BudgetError as error:
        if not stays or device_nbytes >= nbytes + LeastDevice.of(rest, rest_root).nbytes:
            raise
        most = most_to_ask_for(blocks, root, device_nbytes, keeps_gradients=waits)
        least = LeastDevice.of(blocks, root).nbytes
        instead = f"states_on_device='{most}' (bytes)" if most else "states_on_device=0"
        if least > device_nbytes:
            instead += f" and device_memory='{least + device.own_nbytes}'"
        raise BudgetError(f"{error}; or {instead}{', and plan again' if plan is not None else ''}") from error
    if stays and blocks:
        logger.info(
            "in device memory for good, and updated there: %s (%.2f GB)",
            " and ".join(
                ["the root's state"] * stays.root
                + [f"that of the first {stays.n_blocks} blocks"] * bool(stays.n_blocks)
            ),
            nbytes / 1e9,
        )
    return with_device_states(placed, stays, nbytes)


def _of_streamed(plan: Plan) -> Plan:
    """The plan's placement of the blocks that are streamed, numbered from 0."""
    n, n_blocks = plan.on_device_blocks, len(plan.params_in_host)
    if not n:
        return plan
    return plan.model_copy(
        update={
            "n_slots": min(plan.n_slots, n_blocks - n),
            "params_in_host": plan.params_in_host[n:],
            "grads_in_host": plan.grads_in_host[n:],
            "states_in_host": plan.states_in_host[n:],
            "deferred_blocks": tuple(i - n for i in plan.deferred_blocks if i >= n),
        }
    )

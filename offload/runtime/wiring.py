"""The engine's parts, made from what was assembled: scheduler, commits, activation store, plan."""

from __future__ import annotations

import logging

import torch
from torch import nn

from offload.config import Config
from offload.errors import ConfigError
from offload.model.on_device import stays_nbytes
from offload.planner.report import plan_lines
from offload.runtime.assembly import Assembly, staging_nbytes
from offload.runtime.chosen_device import budgets, choose_device
from offload.runtime.commits import StepCommits
from offload.runtime.device_residency import CopiedResidency, Residency, SharedResidency
from offload.runtime.device_updates import DeviceUpdates
from offload.runtime.durable_steps import DurableSteps
from offload.runtime.gradients import Gradients
from offload.runtime.host_slots import HostSlots
from offload.runtime.planning import RunPlan, plan_run
from offload.runtime.scheduler import Scheduler
from offload.runtime.training_state import Stateful
from offload.runtime.verification import Verification
from offload.stores.activations import ActivationStore, Tier
from offload.telemetry import SpanLog, Stalls
from offload.tiers.device import DeviceTier, Pin
from offload.update_rules import UpdateRule

logger = logging.getLogger("offload")


def make_device(model: nn.Module, config: Config) -> DeviceTier:
    """The device tier of the run. What of the model stays in its memory beside the slots is among its `own_nbytes`."""
    device = choose_device(model, config)
    if not device.shares_host:
        device.own_nbytes += stays_nbytes(model)
    return device


def make_scheduler(parts: Assembly, stalls: Stalls, spans: SpanLog, *, pin: Pin, holds: bool) -> Scheduler:
    """The executor over what was assembled, with the gradients it hands to updates."""
    residency: Residency = SharedResidency(parts.resources.device.torch_device)
    if not parts.resources.device.shares_host:
        residency = CopiedResidency(parts.device_slots, parts.resources.device, parts.resources.copies)
    host = HostSlots(parts.slots, parts.resources.store, residency, parts.resources.copies, stalls, spans)
    gradients = Gradients(
        parts.grad_buffers,
        parts.out_buffers,
        parts.resources.device,
        parts.resources.copies,
        parts.resources.store,
        stalls,
        spans,
        parts.spare_host,
        pin,
        parts.one_gradient_each,
        host.complete,
    )
    host.updated = gradients.updated
    on_device = [block for block in [*parts.blocks, parts.root] if block.on_device]
    return Scheduler(
        parts.blocks,
        parts.root,
        host,
        parts.resources.store,
        parts.resources.pipeline,
        residency,
        gradients,
        stalls,
        DeviceUpdates(on_device, parts.resources.device, spans) if on_device else None,
        holds=holds,
    )


def make_commits(
    model: nn.Module, parts: Assembly, config: Config, tracked: dict[str, Stateful], scheduler: Scheduler
) -> StepCommits | None:
    """What makes every step durable; None where durability does not ask for it."""
    store = parts.resources.store
    if config.durability != "step" or store is None:
        return None
    stats, n_threads = parts.resources.pipeline.stats, config.update_threads
    verification = Verification(
        config.verify_reads, lambda: stats()["verify_s"] / n_threads + scheduler.host.verify_s
    )
    return StepCommits(
        model, [parts.root, *parts.blocks], store, config.chunk_elements, tracked, verification
    )


def make_durable_steps(
    commits: StepCommits | None, parts: Assembly, config: Config, scheduler: Scheduler, stalls: Stalls
) -> DurableSteps | None:
    """What commits steps and takes them back. Updates that wait for the norm are clipped, and need no limit."""
    if commits is None:
        return None
    limit = None if config.deferred else config.max_grad_norm
    return DurableSteps(commits, parts.root, parts.blocks, scheduler, stalls, limit)


def left_to_compute_nbytes(parts: Assembly) -> int:
    """Of what is free on the device, what no activation gets where no plan has counted what computes: half, on a device
    with memory of its own."""
    if parts.resources.device.shares_host:
        return 0
    return -(-(parts.device_nbytes - parts.placement.device_nbytes) // 2)


def make_activations(
    parts: Assembly, config: Config, stalls: Stalls, spans: SpanLog, planned: bool
) -> ActivationStore:
    """Without a plan a part of what is free on the device is left to the block that is running."""
    if config.activations == "storage" and parts.resources.store is None:
        raise ConfigError("activations='storage' needs storage=[directory]")
    fixed: dict[str, Tier] = {"device": "device", "host": "host", "storage": "storage"}
    left_nbytes = 0 if planned else left_to_compute_nbytes(parts)
    return ActivationStore(
        parts.resources.device,
        parts.resources.copies,
        parts.resources.store,
        stalls,
        spans,
        tier=fixed.get(config.activations),
        device_nbytes=parts.device_nbytes - parts.placement.device_nbytes - left_nbytes,
        spare_host=parts.spare_host,
        staging=parts.activation_staging,
        pin=config.pin,
        n_blocks=len(parts.blocks),
    )


def make_run_plan(
    model: nn.Module,
    config: Config,
    blocks: object,
    dtype: torch.dtype | None,
    device: DeviceTier,
    rule: UpdateRule,
) -> RunPlan | None:
    """The plan of the run, told line by line; None where none is to be made."""
    device_nbytes, host_nbytes = budgets(device, config)
    planned = plan_run(
        model,
        config,
        blocks,
        device_nbytes=device_nbytes,
        host_nbytes=host_nbytes,
        staging_nbytes=staging_nbytes(config, rule),
        rule=rule,
        shares_host=device.shares_host,
        device_own_nbytes=device.own_nbytes,
        updates_faster=device.updates_faster,
        compute_dtype=dtype,
    )
    if planned is not None:
        for line in plan_lines(planned.plan):
            logger.info("%s", line)
    return planned

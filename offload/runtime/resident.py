"""Small trainable parameters of frozen blocks (adapters): in device memory, or streamed with their block."""

from __future__ import annotations

import logging

from torch import nn

from offload.config import Config
from offload.errors import ConfigError
from offload.model.blocks import Cut
from offload.runtime.chosen_device import budgets
from offload.tiers.device import DeviceTier

logger = logging.getLogger("offload")

_STATE_NBYTES = 16
"""fp32 parameter, gradient and two moments of one element."""

_SHARE_OF_DEVICE = 8
"""Adapters stay in device memory by themselves where they take at most this part of it."""


def _adapters(cut: Cut) -> list[nn.Parameter]:
    """Trainable parameters of blocks that are frozen otherwise, if they are fewer than what is frozen."""
    trainable = [p for block in cut.block_parameters for _, p in block if p.requires_grad]
    frozen = [p for block in cut.block_parameters for _, p in block if not p.requires_grad]
    if sum(p.numel() for p in trainable) >= sum(p.numel() for p in frozen):
        return []
    return trainable


def with_adapters(cut: Cut, config: Config, device: DeviceTier, planned: bool) -> list[Cut]:
    """The cut with adapters where they may be, the best first: in the root where `config.adapters` says so; by itself
    where they are small, unless that does not fit beside the rest.

    Blocks are then only read, never written. Raises ConfigError when a plan, which has counted blocks as they are, is
    contradicted.
    """
    adapters = _adapters(cut)
    if config.adapters == "streamed" or not adapters:
        return [cut]
    if planned:
        if config.adapters == "resident":
            raise ConfigError(
                "adapters='resident' and a plan contradict each other: the plan streams them; leave one out"
            )
        return [cut]
    needed_nbytes = sum(p.numel() for p in adapters) * _STATE_NBYTES
    device_nbytes, _ = budgets(device, config)
    if config.adapters == "auto" and needed_nbytes * _SHARE_OF_DEVICE > device_nbytes:
        return [cut]
    logger.info(
        "adapters (%.1f MB with their state) stay in device memory if the rest fits", needed_nbytes / 1e6
    )
    resident = cut.with_in_root(adapters)
    return [resident] if config.adapters == "resident" else [resident, cut]

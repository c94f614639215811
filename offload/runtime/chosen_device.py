"""The device that a run computes on, what it and the host may hold, and whether anything is streamed at all."""

from __future__ import annotations

import logging

import torch
from torch import nn

from offload.config import Config, host_total_nbytes, parse_budget
from offload.errors import ConfigError
from offload.model.blocks import Cut
from offload.model.flat import lay_out
from offload.planner.states_on_device import scratch_nbytes
from offload.tiers.device import CudaDevice, DeviceTier, SharedDevice
from offload.tiers.emulated_device import EmulatedDevice
from offload.update_rules import UpdateRule

logger = logging.getLogger("offload")


def choose_device(model: nn.Module, config: Config) -> DeviceTier:
    """The device tier that `config.device` means for this model. Raises ConfigError when it is not there."""
    wanted = config.device
    if wanted == "emulated":
        return EmulatedDevice(config.bus_bytes_per_s)
    if wanted == "auto":
        on_cuda = next((str(p.device) for p in model.parameters() if p.device.type == "cuda"), None)
        wanted = on_cuda or ("cuda" if torch.cuda.is_available() else "cpu")
    torch_device = torch_device_named(wanted)
    if torch_device.type == "cuda":
        total_nbytes = torch.cuda.get_device_properties(torch_device).total_memory
        return CudaDevice(torch_device, parse_budget(config.device_memory, total_nbytes))
    return SharedDevice()


def torch_device_named(name: str) -> torch.device:
    """ "cpu", "cuda" or "cuda:1". Raises ConfigError for another name, and for a device that is not there."""
    try:
        found = torch.device(name)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"device={name!r} is not known; write 'auto', 'cpu', 'cuda', 'cuda:1' or 'emulated'"
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise ConfigError(
            f"device={name!r}, but this torch sees {f'{n} CUDA devices, from cuda:0' if n else 'no CUDA device'}"
        )
    return found


def budgets(device: DeviceTier, config: Config) -> tuple[int, int]:
    """(device, host) memory allowed, in bytes, without what stays on the device beside the slots (`own_nbytes`)."""
    host_total = host_total_nbytes()
    device_total = host_total
    if device.torch_device.type == "cuda":
        device_total = torch.cuda.get_device_properties(device.torch_device).total_memory
    device_nbytes = parse_budget(config.device_memory, device_total) - device.own_nbytes
    return device_nbytes, parse_budget(config.host_memory, host_total)


def steps_aside(
    cut: Cut, config: Config, device: DeviceTier, compute_dtype: torch.dtype | None, rule: UpdateRule
) -> bool:
    """Whether everything stays in device memory and nothing is streamed: the other half is for activations.

    A device of its own makes updates of fp32 moments only; with others, or with a rule in Python, everything streams.
    """
    if not device.shares_host and not rule.made_on_device:
        if config.step_aside == "always":
            raise ConfigError(
                f"step_aside='always' on a {device.torch_device.type} device updates with AdamW, Adam, SGD and Lion on "
                f"fp32 moments; this optimizer is {rule.described}: leave step_aside at 'auto'"
            )
        return False
    if config.step_aside != "auto":
        return config.step_aside == "always"
    if config.durability == "step":
        return False
    if config.micro_batches > 1 or config.activations in ("host", "storage"):
        return False
    parameters = [*cut.root, *(p for block in cut.block_parameters for p in block)]
    layout = lay_out("all", parameters, compute_dtype, rule, config.chunk_elements)
    grad_nbytes = 4 * layout.grad_elements
    needed_nbytes = layout.slot_nbytes + layout.state_nbytes + grad_nbytes
    if not device.shares_host:
        needed_nbytes += scratch_nbytes(grad_nbytes)
    device_nbytes, _ = budgets(device, config)
    if 2 * needed_nbytes > device_nbytes:
        return False
    logger.info(
        "all training state (%.2f GB) fits in half of device_memory (%.2f GB): nothing is streamed",
        needed_nbytes / 1e9,
        device_nbytes / 1e9,
    )
    return True

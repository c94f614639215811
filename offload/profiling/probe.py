"""Measure this machine: the profile that the planner reads, in under a minute and with bounded writes.

The room is above the planner, whose `Hardware` it fills and which must not touch torch, clocks or drives itself, and
below the runtime, which may want to measure before it places anything.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload.config import host_total_nbytes
from offload.errors import ConfigError
from offload.planner.hardware import Hardware
from offload.planner.rates import ADAM_DRAM_NBYTES
from offload.profiling import SECONDS, compute_probe
from offload.profiling.storage_probe import check_limit, probe_drives
from offload.tiers.device import CudaDevice

WRITTEN_NBYTES_MAX = 2 * 10**9
"""Bytes written to each drive unless said otherwise."""

_STORAGE_SHARE = 0.6
_N_COMPUTE_PHASES = 5


def probe(
    storage: Sequence[str] = (),
    *,
    shapes: Sequence[tuple[int, int]] = compute_probe.DEFAULT_SHAPES,
    n_tokens: int | None = None,
    written_nbytes_max: int = WRITTEN_NBYTES_MAX,
    seconds: float = SECONDS,
    name: str = "",
    note: Callable[[str], None] = lambda text: None,
) -> Hardware:
    """Rates of the drives behind the directories `storage`, of DRAM, AdamW, matrix products and, with CUDA, the bus.

    `shapes` are (in, out) of the matrices to multiply `n_tokens` rows with (2048 on a GPU, 128 on a CPU);
    `written_nbytes_max` bounds the bytes written to each directory, `seconds` the time spent measuring. Progress goes
    to `note`. Files are removed in any case. Raises ConfigError for settings that cannot be measured with, StoreError
    where a directory has no room.
    """
    if not 0 < seconds <= 600:
        raise ConfigError(f"seconds={seconds} must be above 0 and at most 600")
    if len({os.path.realpath(directory) for directory in storage}) != len(storage):
        raise ConfigError(f"a directory is named twice: {', '.join(storage)}")
    for directory in storage:
        if not os.path.isdir(directory):
            raise ConfigError(f"{directory}: no such directory; make it on the drive to be measured")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{directory}: this user cannot write there; name another directory on the drive"
            )
    if storage:
        check_limit(written_nbytes_max)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    phase_s = (1 - _STORAGE_SHARE if storage else 1.0) * seconds / _N_COMPUTE_PHASES
    found = _compute_rates(
        device, shapes, n_tokens or (2048 if device.type == "cuda" else 128), phase_s, note
    )
    sources = dict.fromkeys(found, "probe")
    if storage:
        drives, together, is_direct = probe_drives(
            storage, written_nbytes_max=written_nbytes_max, seconds=_STORAGE_SHARE * seconds, note=note
        )
        found["drives"] = drives
        sources.update(_drive_sources(written_nbytes_max, is_direct))
        if together is not None:
            found["storage_read_bytes_per_s"] = together.read_bytes_per_s
            found["storage_write_bytes_per_s"] = together.write_bytes_per_s
            found["storage_mixed_bytes_per_s"] = together.mixed_bytes_per_s
            sources |= {
                f"storage_{kind}_bytes_per_s": "probe, all drives" for kind in ("read", "write", "mixed")
            }
    return Hardware(
        name=name or platform.node(),
        source=f"probe of {time.strftime('%Y-%m-%d %H:%M')}, torch {torch.__version__}",
        shares_host=device.type == "cpu",
        host_memory_nbytes=host_total_nbytes(),
        device_memory_nbytes=_device_memory_nbytes(device),
        sources={**sources, "host_memory_nbytes": "system", "device_memory_nbytes": "system"},
        **found,
    )


def _device_memory_nbytes(device: torch.device) -> int:
    if device.type == "cpu":
        return host_total_nbytes()
    return int(torch.cuda.get_device_properties(device).total_memory)


def _compute_rates(
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    n_tokens: int,
    phase_s: float,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Fields of `Hardware` that need no drive."""
    found: dict[str, Any] = {}
    note("DRAM")
    dram = compute_probe.dram_bytes_per_s(phase_s)
    note("AdamW in DRAM")
    adam = found["adam_params_per_s"] = compute_probe.update_params_per_s(phase_s)
    found["dram_bytes_per_s"] = max(dram, ADAM_DRAM_NBYTES * adam)  # what has been seen cannot be too much
    note("other optimizers in DRAM")
    rules = compute_probe.other_rules()
    found["update_params_per_s"] = {
        rule.key: compute_probe.update_params_per_s(phase_s / len(rules), rule) for rule in rules
    }
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        dtype_name = str(dtype).removeprefix("torch.")
        note(f"matrix products on {device.type} in {dtype_name}")
        rates[dtype_name] = compute_probe.matmul_flops_per_s(shapes, n_tokens, dtype, device, phase_s)
    found["matmul_flops_per_s"] = rates
    if device.type == "cuda":
        tier = CudaDevice(device, torch.cuda.get_device_properties(device).total_memory)
        try:
            note("AdamW on the device")
            found["device_adam_params_per_s"] = compute_probe.device_adam_params_per_s(tier, phase_s / 8)
            note("bus: to the device, to the host, both")
            found.update(compute_probe.bus_bytes_per_s(tier, phase_s))
        finally:
            tier.close()
    return found


def _drive_sources(written_nbytes_max: int, is_direct: bool) -> dict[str, str]:
    cached = "" if is_direct else "; the file system refuses O_DIRECT, so the page cache is in it"
    burst = (
        f"; over at most {written_nbytes_max / 1e9:.2g} GB, which a consumer drive takes into its fast cache"
    )
    return {
        "drives.read_bytes_per_s": f"probe{cached}",
        "drives.write_bytes_per_s": f"probe{burst}{cached}",
        "drives.mixed_bytes_per_s": f"probe{burst}{cached}",
        "drives.capacity_nbytes": "file system",
    }

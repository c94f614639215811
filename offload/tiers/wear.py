"""How worn a drive is, as it says itself (SMART), where this user may ask: through smartctl of smartmontools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

DATA_UNIT_NBYTES = 512_000
"""NVM Express Base Specification 2.0, SMART log: data units written are counted in thousands of 512 bytes."""


@dataclass(frozen=True)
class Wear:
    """Of the drive under a directory. `used_fraction` is of its rated endurance; it may exceed 1."""

    device: str
    used_fraction: float
    written_nbytes: int

    def steps_left(self, rated_nbytes: float, written_nbytes_per_step: float) -> float:
        """Optimizer steps until the rated endurance is used up, given what this drive writes in one."""
        if written_nbytes_per_step <= 0:
            return float("inf")
        return max(0.0, 1.0 - self.used_fraction) * rated_nbytes / written_nbytes_per_step


def device_of(directory: str) -> str | None:
    """The block device that holds `directory`, such as /dev/nvme0n1; None where there is none (tmpfs, network)."""
    number = os.stat(directory).st_dev
    entry = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not os.path.exists(entry):
        return None
    real = os.path.realpath(entry)
    if os.path.exists(os.path.join(real, "partition")):
        real = os.path.dirname(real)
    return "/dev/" + os.path.basename(real)


def parse_smart(device: str, content: Any) -> Wear | None:
    """The wear in `smartctl --json -a`'s output; None when the drive does not report it."""
    log = content.get("nvme_smart_health_information_log") if isinstance(content, dict) else None
    if not isinstance(log, dict):
        return None
    used, units = log.get("percentage_used"), log.get("data_units_written")
    if not isinstance(used, int) or not isinstance(units, int):
        return None
    return Wear(device, used / 100, units * DATA_UNIT_NBYTES)


def wear_of(directory: str) -> Wear | str:
    """The wear of the drive under `directory`, or a sentence that says why it cannot be read."""
    try:
        device = device_of(directory)
    except OSError as error:
        return f"{directory}: {error.strerror}"
    if device is None:
        return f"{directory} is on no block device of its own"
    program = shutil.which("smartctl")
    if program is None:
        return "smartctl (smartmontools) is not installed"
    try:
        done = subprocess.run([program, "--json", "-a", device], capture_output=True, timeout=10, check=False)
        found = parse_smart(device, json.loads(done.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"smartctl {device}: {error}"
    return found or f"{device} reports no wear, or this user may not ask it"

"""`offload doctor`: what the machine has, and what will be used."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import tempfile
from typing import Any, TextIO

import psutil
import torch

from offload import _C
from offload.config import Config, host_total_nbytes
from offload.errors import ConfigError
from offload.optim.updater import fused_or_why_not
from offload.profiling.processor import has_bfloat16_products
from offload.profiling.stored import profile_path, stored_hardware
from offload.tiers.device import CudaDevice, allocator_hint
from offload.tiers.host import HostArena
from offload.tiers.mounts import mount_of
from offload.tiers.storage import leftover_stores


def _rotational(path: str) -> bool | None:
    device = os.stat(path).st_dev
    base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for place in (f"{base}/queue/rotational", f"{base}/../queue/rotational"):
        try:
            with open(place, encoding="ascii") as file:
                return file.read().strip() == "1"
        except OSError:
            continue
    return None


def _examine_drive(directory: str) -> dict[str, Any]:
    """Try the I/O engine on a small file in `directory`."""
    found: dict[str, Any] = {"directory": os.path.abspath(directory)}
    if not os.path.isdir(directory):
        return {**found, "usable": False, "reason": "no such directory"}
    found.update(mount_of(directory))
    found["free_bytes"] = shutil.disk_usage(directory).free
    found["rotational"] = _rotational(directory)
    found["leftover_stores"] = [
        {"path": path, "bytes": nbytes} for path, nbytes in leftover_stores(directory)
    ]
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix="offload-doctor-") as file:
            os.truncate(file.fileno(), 1 << 20)
            arena = HostArena(4096)
            engine = _C.Engine([file.name])
            try:
                engine.write(arena.address, 4096, 0).wait(10.0)
                found["backend"], found["backend_reason"] = engine.backend, engine.backend_reason
                found["o_direct"] = engine.direct
            finally:
                engine.close()
    except (OSError, ValueError) as error:
        return {**found, "usable": False, "reason": str(error)}
    return {**found, "usable": True}


def _examine_gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory}
        gpus.append({**gpu, "unfused_updates": _why_unfused(index, properties.total_memory)})
    return gpus


def _why_unfused(index: int, memory_nbytes: int) -> str | None:
    """Why AdamW on that GPU is made in torch's operations; None where one kernel makes it."""
    tier = CudaDevice(torch.device("cuda", index), memory_nbytes)
    try:
        fused, why_not = fused_or_why_not(tier)
    finally:
        tier.close()
    return None if fused is not None else why_not


def _examine_profile() -> dict[str, Any]:
    """The stored hardware profile, as far as there is one."""
    found: dict[str, Any] = {"path": profile_path(), "name": None}
    if not os.path.exists(found["path"]):
        return {**found, "problem": None}
    try:
        profile = stored_hardware()
    except ConfigError as error:
        return {**found, "problem": str(error)}
    return {**found, "problem": None, "name": profile.name, "source": profile.source}


def examine(directories: list[str]) -> dict[str, Any]:
    """Everything `offload doctor` says, as plain data. Sizes in bytes."""
    memory = psutil.virtual_memory()
    locked_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    levels = _C.simd_levels()
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "simd_levels": levels,
        "bfloat16_products": has_bfloat16_products(),
        "dram_bytes": memory.total,
        "dram_available_bytes": memory.available,
        "dram_limit_bytes": host_total_nbytes(),
        "memlock_limit_bytes": None if locked_bytes == resource.RLIM_INFINITY else locked_bytes,
        "gpus": _examine_gpus(),
        "profile": _examine_profile(),
        "update_threads": Config().beside("cuda" if torch.cuda.is_available() else "cpu").update_threads,
        "drives": [_examine_drive(directory) for directory in directories],
    }


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def _drive_lines(drive: dict[str, Any]) -> list[str]:
    where = drive["directory"]
    if "file_system" in drive:
        where += f" ({drive['file_system']} on {drive['device']})"
    lines = [f"storage      {where}"]
    if "free_bytes" in drive:
        kind = {
            True: ", rotating, says the kernel (virtual disks often claim it)",
            False: ", solid state",
            None: "",
        }[drive["rotational"]]
        lines.append(f"             {_gb(drive['free_bytes'])} free{kind}")
    if drive.get("leftover_stores"):
        nbytes = sum(store["bytes"] for store in drive["leftover_stores"])
        lines.append(
            f"             {len(drive['leftover_stores'])} store files of runs that have ended take {_gb(nbytes)}; "
            "if none was kept on purpose: rm offload-*.store there"
        )
    if not drive["usable"]:
        return [*lines, f"             cannot be used: {drive['reason']}"]
    reason = f" ({drive['backend_reason']})" if drive["backend_reason"] else ""
    direct = (
        "yes"
        if drive["o_direct"]
        else "refused by the file system: reads and writes go through the page cache"
    )
    return [
        *lines,
        f"             I/O backend: {drive['backend']}{reason}",
        f"             O_DIRECT: {direct}",
    ]


def _profile_line(profile: dict[str, Any]) -> str:
    if profile["problem"] is not None:
        return f"profile      cannot be used: {profile['problem']}"
    if profile["name"] is None:
        return f"profile      none in {profile['path']}: `offload probe --storage DIR` measures this machine"
    return f"profile      {profile['name']} ({profile['source']}), {profile['path']}"


def _used(found: dict[str, Any]) -> str:
    """What a run with these directories would use, in one line."""
    usable = [drive for drive in found["drives"] if drive["usable"]]
    backends = sorted({drive["backend"] for drive in usable})
    direct = all(drive["o_direct"] for drive in usable)
    storage = "no storage: everything must fit host memory"
    if usable:
        storage = f"{len(usable)} storage directories through {' and '.join(backends)}, "
        storage += "past the page cache" if direct else "through the page cache where O_DIRECT is refused"
    gpu = found["gpus"][0]["name"] if found["gpus"] else "DRAM as device tier"
    return f"{gpu}; {storage}; {found['update_threads']} update threads with {found['simd_levels'][-1]}"


def show(found: dict[str, Any], out: TextIO, *, as_json: bool) -> None:
    """Print what `examine` has found."""
    if as_json:
        print(json.dumps(found), file=out)
        return
    levels = found["simd_levels"]
    lines = [
        f"system       Linux {found['kernel']}, Python {found['python']}, torch {found['torch']}",
        f"CPU          {found['cpu_cores']} cores for this process; updates use {levels[-1]} (of {', '.join(levels)})",
        f"DRAM         {_gb(found['dram_bytes'])}, {_gb(found['dram_available_bytes'])} available",
    ]
    if not found["bfloat16_products"] and not found["gpus"]:
        lines.insert(
            2, "             no instructions for bf16 products: compute in float32 here, it is far faster"
        )
    if found["dram_limit_bytes"] < found["dram_bytes"]:
        lines.append(
            f"             limited by its cgroup to {_gb(found['dram_limit_bytes'])}: percentages count from that"
        )
    locked = found["memlock_limit_bytes"]
    if locked is not None:
        lines.append(
            f"             up to {locked / 1e6:.1f} MB may be locked (ulimit -l): larger I/O buffers stay unregistered"
        )
    for gpu in found["gpus"]:
        lines.append(f"GPU          {gpu['name']}, {_gb(gpu['memory_bytes'])}")
        why = gpu["unfused_updates"]
        made = "one kernel" if why is None else f"torch's operations, eight times slower: {why}"
        lines.append(f"             state that stays on it is updated by {made}")
    if found["gpus"] and (hint := allocator_hint(os.environ)) is not None:
        lines.append(f"             {hint}")
    if not found["gpus"]:
        lines.append("GPU          none that torch sees: the device tier is a bounded part of DRAM")
    lines.append(_profile_line(found["profile"]))
    for drive in found["drives"]:
        lines += _drive_lines(drive)
    lines.append(f"will be used {_used(found)}")
    print("\n".join(lines), file=out)

"""A machine as the planner sees it: sizes in bytes, rates in bytes/s, FLOP/s and parameters/s. No torch, no clock."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload.errors import ConfigError


class Drive(BaseModel):
    """One drive. `mixed_bytes_per_s` is the sum of both directions when equal parts are read and written at once;
    None means that reads and writes share the drive's time (their seconds add)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    read_bytes_per_s: float = Field(gt=0)
    write_bytes_per_s: float = Field(gt=0)
    mixed_bytes_per_s: float | None = Field(default=None, gt=0)
    capacity_nbytes: int | None = Field(default=None, gt=0)
    endurance_nbytes: float | None = Field(default=None, gt=0)
    """Bytes the maker allows to be written over the drive's life (TBW)."""
    name: str = ""
    """The directory that was probed, or the drive's model."""


class Hardware(BaseModel):
    """One machine: a device, its host and its drives. `shares_host` is set where the device tier is DRAM (no bus)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    source: str
    """Where the figures come from: `probe`, a data sheet, a paper's table."""
    shares_host: bool
    device_memory_nbytes: int = Field(gt=0)
    host_memory_nbytes: int = Field(gt=0)
    matmul_flops_per_s: dict[str, float]
    """Achieved at a model's shapes, by dtype: `bfloat16`, `float32`."""
    work_flops_per_s: dict[str, float] = Field(default_factory=dict)
    """Achieved at one model's own shapes and micro-batch, everything beside the products included, by what is done:
    `forward`, `recompute`, `backward` of a block, `root_forward`, `root_backward`. What is absent runs at the
    matrix products' rate."""
    work_dtype: str = ""
    """What `work_flops_per_s` was measured in; models computed in another are planned with products. Empty: any."""
    compute_speed_beside_update: float = Field(default=0.5, gt=0, le=1)
    """Where the device tier is DRAM: share of its speed that computing keeps while the update threads are busy."""
    update_speed_beside_compute: float = Field(default=0.5, gt=0, le=1)
    compute_speed_beside_storage: float = Field(default=1.0, gt=0, le=1)
    """Where the device tier is DRAM: share of its speed that computing keeps while the drives are read or written."""
    storage_speed_beside_compute: float = Field(default=1.0, gt=0, le=1)
    """And the share of their speed that the drives keep: requests need the cores that compute."""
    launch_overhead_s: float = Field(default=2e-4, ge=0)
    """Device time of one micro-batch through one block in one direction that its FLOPs do not explain."""
    h2d_bytes_per_s: float | None = Field(default=None, gt=0)
    d2h_bytes_per_s: float | None = Field(default=None, gt=0)
    h2d_duplex_bytes_per_s: float | None = Field(default=None, gt=0)
    """While the other direction is busy too; None means as fast as alone."""
    d2h_duplex_bytes_per_s: float | None = Field(default=None, gt=0)
    device_adam_params_per_s: float | None = Field(default=None, gt=0)
    """AdamW on state in the memory of a device of its own. Without it no update is planned to be made there."""
    dram_bytes_per_s: float = Field(gt=0)
    """Read and written, the lines too that are read because they are written."""
    adam_params_per_s: float = Field(gt=0)
    """Fused AdamW on state in DRAM, all update threads together."""
    update_params_per_s: dict[str, float] = Field(default_factory=dict)
    """The same of other rules and formats of moments, by `UpdateRule.key` (`lion_fp32`, `adamw_8bit`). What is absent
    updates as fast as AdamW."""
    drives: tuple[Drive, ...] = ()
    storage_read_bytes_per_s: float | None = Field(default=None, gt=0)
    """Limit of all drives together (a shared link); None means that the drives' rates add."""
    storage_write_bytes_per_s: float | None = Field(default=None, gt=0)
    storage_mixed_bytes_per_s: float | None = Field(default=None, gt=0)
    """Limit of all drives together while reading and writing equal parts, both directions added."""
    step_overhead_s: float = Field(default=0.0, ge=0)
    """Fixed time of a step that no byte or FLOP explains."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where each figure comes from, by field name; drives as `drives.read_bytes_per_s`."""


PROFILE_DIRECTORY = pathlib.Path(__file__).parent / "profiles"
_NAMED = re.compile(r"^(?P<base>.+?)(?:-(?P<drives>\d+)ssds?)?$")
_DRIVES_MAX = 64
_BY_NAME = ("matmul_flops_per_s", "work_flops_per_s", "update_params_per_s")
"""Fields whose rates have names of their own."""


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the library. `-<n>ssd` after one means n of its drives."""
    return sorted(path.stem for path in PROFILE_DIRECTORY.glob("*.json"))


def load_hardware(source: str, overrides: Sequence[str] = ()) -> Hardware:
    """The profile of that name (`rtx4090-12ssd`) or in that JSON file, with `key=value` overrides applied in order.

    A key is a field's name; `drives.0.read_bytes_per_s` is that of the first drive, `drives.*.read_bytes_per_s` of
    all, `matmul_flops_per_s.bfloat16` an entry. Values are JSON (`7e9`, `null`, `true`) or plain text. Raises
    ConfigError for an unknown name, key or value.
    """
    return override(_read(source), overrides)


def override(profile: Hardware | dict[str, Any], overrides: Sequence[str]) -> Hardware:
    """`profile` with `key=value` overrides, checked; each overridden figure's source says so."""
    data = profile.model_dump() if isinstance(profile, Hardware) else profile
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"override {text!r} not understood; write key=value, as in dram_bytes_per_s=5e10"
            )
        _set(data, key.strip().split("."), _parse(value.strip()), text)
        sources = data.setdefault("sources", {})
        if isinstance(sources, dict):
            sources[key.strip()] = "override"
    return _checked(data)


def save_hardware(profile: Hardware, path: str) -> None:
    """Write `profile` as JSON that `load_hardware` reads; directories are made. Replaces the file in one step."""
    directory = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(directory, exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(profile.model_dump_json(indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: the profile cannot be written: {error.strerror}") from error


def _read(source: str) -> dict[str, Any]:
    path, n_drives = pathlib.Path(source), None
    if not path.is_file():
        match = _NAMED.match(source.lower())
        base = match["base"] if match else ""
        if base not in shipped_profiles():
            raise ConfigError(
                f"hardware profile {source!r}: no such file, and none of that name comes with offload; there are "
                f"{', '.join(shipped_profiles())}, each also as NAME-<n>ssd, or run `offload probe`"
            )
        path = PROFILE_DIRECTORY / f"{base}.json"
        n_drives = int(match["drives"]) if match and match["drives"] else None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a hardware profile: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a hardware profile is a JSON object, this is {type(data).__name__}")
    if n_drives is not None:
        if n_drives > _DRIVES_MAX:
            raise ConfigError(f"hardware profile {source!r}: {n_drives} drives; at most {_DRIVES_MAX}")
        data["drives"] = data["drives"] * n_drives
        data["name"] = f"{data['name']}, {n_drives} drive{'s' if n_drives != 1 else ''}"
    return data


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _set(data: Any, keys: list[str], value: Any, text: str) -> None:
    """Set one figure inside nested objects and lists; `*` stands for every element of a list."""
    key, rest = keys[0], keys[1:]
    if isinstance(data, (list, tuple)):
        indices = range(len(data)) if key == "*" else [int(key)] if key.isdigit() else []
        if not indices or max(indices) >= len(data) or not rest:
            raise ConfigError(
                f"override {text!r}: there are {len(data)} drives, counted from 0; say which, or *"
            )
        for index in indices:
            _set(data[index], rest, value, text)
    elif not isinstance(data, dict):
        raise ConfigError(f"override {text!r}: {key!r} is inside a single figure")
    elif rest:
        if key in _BY_NAME:
            data.setdefault(key, {})
        if key not in data or data[key] is None:
            raise ConfigError(f"override {text!r}: the profile has no {key!r}")
        if isinstance(data[key], (list, tuple)):
            data[key] = [dict(element) for element in data[key]]
        _set(data[key], rest, value, text)
    else:
        data[key] = value


def _checked(data: dict[str, Any]) -> Hardware:
    try:
        profile = Hardware.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"hardware profile {data.get('name', '')!r}: {problems}") from error
    for field in _BY_NAME:
        for name, rate in getattr(profile, field).items():
            if not 0 < rate < float("inf"):
                raise ConfigError(f"hardware profile {profile.name!r}: {field}.{name} is {rate}")
    return profile

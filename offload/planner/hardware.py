"""A machine as the planner sees it: sizes in bytes, rates in bytes/s, FLOP/s and parameters/s. No torch, no clock."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Drive(BaseModel):
    """One drive. `mixed_bytes_per_s` is the sum of both directions when equal parts are read and written at once;
    None means that reads and writes share the drive's time (their seconds add)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
    """Where the figures come from: `probe`, a data sheet, a paper's table."""
    shares_host: bool
    device_memory_nbytes: int = Field(gt=0)
    host_memory_nbytes: int = Field(gt=0)
    matmul_flops_per_s: dict[str, float]
    """Achieved at a model's shapes, by dtype: `bfloat16`, `float32`."""
    launch_overhead_s: float = Field(default=2e-4, ge=0)
    """Device time of one micro-batch through one block in one direction that its FLOPs do not explain."""
    h2d_bytes_per_s: float | None = Field(default=None, gt=0)
    d2h_bytes_per_s: float | None = Field(default=None, gt=0)
    h2d_duplex_bytes_per_s: float | None = Field(default=None, gt=0)
    """While the other direction is busy too; None means as fast as alone."""
    d2h_duplex_bytes_per_s: float | None = Field(default=None, gt=0)
    dram_bytes_per_s: float = Field(gt=0)
    """A copy's bytes count twice: read and written."""
    adam_params_per_s: float = Field(gt=0)
    """Fused AdamW on state in DRAM, all update threads together."""
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

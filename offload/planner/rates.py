"""What a machine's figures say together: storage as one resource, the two directions of the bus, the shared DRAM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offload.errors import ConfigError
from offload.planner.hardware import Drive, Hardware
from offload.update_rules import ADAMW, UpdateRule

COPY_DRAM_NBYTES = 3
"""DRAM traffic of a byte copied: read, and the line that is written is read first."""

ADAM_DRAM_NBYTES = 28
"""DRAM traffic of a parameter's update by AdamW (docs/profiles.md)."""


@dataclass(frozen=True)
class StorageRates:
    """All drives striped evenly, so the slowest sets the pace. Rates in bytes/s.

    `drive_*` is what the drives do, `read`/`write` what a shared link lets through. `capacity` is how much drive time
    there is in a second when reads and writes mix: 1 where their seconds add, up to 2 where both run at full rate.
    """

    drive_read: float
    drive_write: float
    read: float
    write: float
    capacity: float

    def seconds(self, read_nbytes: Any, written_nbytes: Any) -> Any:
        """Time to read and write so many bytes, overlapped as far as the drives allow."""
        drive = read_nbytes / self.drive_read + written_nbytes / self.drive_write
        alone = np.maximum(read_nbytes / self.read, written_nbytes / self.write)
        return np.maximum(alone, drive / self.capacity)

    def mixed(self) -> tuple[float, float]:
        """Fractions of `read` and `write` that a read and a write get while both run: equal drive time each, and
        what a slow link leaves unused goes to the other."""
        half = self.capacity / 2
        read_share = min(half, self.read / self.drive_read)
        write_share = min(half, self.write / self.drive_write)
        read_share = min(self.read / self.drive_read, max(read_share, self.capacity - write_share))
        write_share = min(self.write / self.drive_write, max(write_share, self.capacity - read_share))
        return read_share * self.drive_read / self.read, write_share * self.drive_write / self.write


@dataclass(frozen=True)
class BusRates:
    """Bytes/s between host and device, alone and while the other direction is busy."""

    h2d: float
    d2h: float
    h2d_duplex: float
    d2h_duplex: float

    def seconds(self, h2d_nbytes: Any, d2h_nbytes: Any) -> Any:
        """Both directions started together: duplex rates until the shorter one is done, then the other alone."""
        both = np.minimum(h2d_nbytes / self.h2d_duplex, d2h_nbytes / self.d2h_duplex)
        return both + (
            np.maximum(0.0, h2d_nbytes - both * self.h2d_duplex) / self.h2d
            + np.maximum(0.0, d2h_nbytes - both * self.d2h_duplex) / self.d2h
        )


@dataclass(frozen=True)
class Rates:
    """Everything the cost model and the simulator divide by."""

    flops_per_s: float
    bus: BusRates
    storage: StorageRates | None
    dram_bytes_per_s: float
    update_params_per_s: float
    shares_host: bool
    """The device tier is DRAM: nothing crosses a bus, and computing and updating share the cores."""
    compute_beside_update: float = 0.5
    """Share of its own speed that each keeps while both run, where they share the cores."""
    update_beside_compute: float = 0.5
    compute_beside_storage: float = 1.0
    storage_beside_compute: float = 1.0
    work_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    """By kind of work, where it is known better than `flops_per_s`: `Hardware.work_flops_per_s`."""

    def slowness(self, work: str) -> float:
        """Seconds a FLOP of this kind of work takes, in units of a FLOP of a matrix product."""
        return self.flops_per_s / self.work_flops_per_s.get(work, self.flops_per_s)

    def seconds_beside_products(self, work: str, flops: Any) -> Any:
        """What this kind of work takes for so many FLOPs beyond the matrix products: element-wise operations and what
        else the rate of the whole has in it. 0 where that rate is not known, or is no lower than the products'."""
        return flops * max(0.0, self.slowness(work) - 1) / self.flops_per_s

    def shared_cores_s(self, compute_s: Any, update_s: Any, storage_s: Any) -> Any:
        """Time to compute `compute_s` on cores that also update for `update_s` and serve the drives for `storage_s`,
        each as if it were alone: both until the shorter is done, then the other alone."""
        with_update = np.minimum(
            compute_s / self.compute_beside_update, update_s / self.update_beside_compute
        )
        both_s = (
            with_update
            + np.maximum(0.0, compute_s - with_update * self.compute_beside_update)
            + np.maximum(0.0, update_s - with_update * self.update_beside_compute)
        )
        slowed_s = np.minimum(storage_s, both_s / self.compute_beside_storage)
        return both_s + (1 - self.compute_beside_storage) * slowed_s

    def slowed_storage_s(self, storage_s: Any, compute_s: Any) -> Any:
        """Time of transfers that take `storage_s` alone beside `compute_s` of computing on the cores they need."""
        slowed_s = np.minimum(storage_s / self.storage_beside_compute, compute_s)
        return storage_s + (1 - self.storage_beside_compute) * slowed_s


def _capacity(drive: Drive) -> float:
    """Drive seconds in a second of mixed traffic: equal parts of read and write at `mixed_bytes_per_s` altogether."""
    if drive.mixed_bytes_per_s is None:
        return 1.0
    each = drive.mixed_bytes_per_s / 2
    return min(2.0, each / drive.read_bytes_per_s + each / drive.write_bytes_per_s)


def storage_rates(hardware: Hardware) -> StorageRates | None:
    """The drives together; None without drives."""
    drives = hardware.drives
    if not drives:
        return None
    read = len(drives) * min(d.read_bytes_per_s for d in drives)
    write = len(drives) * min(d.write_bytes_per_s for d in drives)
    capacity = min(_capacity(d) for d in drives)
    if hardware.storage_mixed_bytes_per_s is not None:
        capacity = min(capacity, hardware.storage_mixed_bytes_per_s / 2 * (1 / read + 1 / write))
    return StorageRates(
        drive_read=read,
        drive_write=write,
        read=min(read, hardware.storage_read_bytes_per_s or read),
        write=min(write, hardware.storage_write_bytes_per_s or write),
        capacity=capacity,
    )


def rates_of(hardware: Hardware, param_nbytes: int, rule: UpdateRule = ADAMW) -> Rates:
    """Rates for a model computed with parameters of `param_nbytes` and updated by `rule`.

    Raises ConfigError when the profile lacks one.
    """
    dtype = "float32" if param_nbytes == 4 else "bfloat16"
    if dtype not in hardware.matmul_flops_per_s:
        raise ConfigError(
            f"hardware profile {hardware.name} has no matmul rate for {dtype}, only for "
            f"{', '.join(sorted(hardware.matmul_flops_per_s)) or 'nothing'}: add matmul_flops_per_s.{dtype}"
        )
    copy = hardware.dram_bytes_per_s / COPY_DRAM_NBYTES
    h2d, d2h = hardware.h2d_bytes_per_s, hardware.d2h_bytes_per_s
    if not hardware.shares_host and (h2d is None or d2h is None):
        raise ConfigError(
            f"hardware profile {hardware.name} has a device of its own but no bus: "
            "give h2d_bytes_per_s and d2h_bytes_per_s"
        )
    h2d, d2h = h2d or copy, d2h or copy
    return Rates(
        flops_per_s=hardware.matmul_flops_per_s[dtype],
        bus=BusRates(
            h2d, d2h, hardware.h2d_duplex_bytes_per_s or h2d, hardware.d2h_duplex_bytes_per_s or d2h
        ),
        storage=storage_rates(hardware),
        dram_bytes_per_s=hardware.dram_bytes_per_s,
        update_params_per_s=hardware.update_params_per_s.get(rule.key, hardware.adam_params_per_s),
        shares_host=hardware.shares_host,
        compute_beside_update=hardware.compute_speed_beside_update,
        update_beside_compute=hardware.update_speed_beside_compute,
        compute_beside_storage=hardware.compute_speed_beside_storage,
        storage_beside_compute=hardware.storage_speed_beside_compute,
        work_flops_per_s=hardware.work_flops_per_s if hardware.work_dtype in ("", dtype) else {},
    )

"""The floor of a step: the least time it can take here, and how near a step has come to it.

    floor_s = max(arithmetic_s, read_bytes / read rate + written_bytes / write rate)

`arithmetic_s` is the shortest time that any step so far has spent on anything but waiting (its seconds minus its
stalls). The bytes are those counted in the step itself. The rates are what the drives did in a short transfer before
training, or more where the run has shown more. Reads and writes of one drive share its time, so their seconds add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StorageRates:
    """What the storage directories do together, in bytes a second."""

    read_bytes_per_s: float
    write_bytes_per_s: float


def storage_s(read_bytes: float, written_bytes: float, rates: StorageRates) -> float:
    """Seconds the drives need for these bytes."""
    return read_bytes / rates.read_bytes_per_s + written_bytes / rates.write_bytes_per_s


def floor_s(
    arithmetic_s: float, read_bytes: float, written_bytes: float, rates: StorageRates | None
) -> float:
    """The least seconds a step of that arithmetic and those bytes can take; `rates` None: no storage."""
    if rates is None:
        return arithmetic_s
    return max(arithmetic_s, storage_s(read_bytes, written_bytes, rates))


def at_least_as_seen(
    rates: StorageRates, read_bytes: float, written_bytes: float, seconds: float
) -> StorageRates:
    """`rates`, raised in proportion where `seconds` were enough for more bytes than they allow."""
    if seconds <= 0:
        return rates
    factor = max(1.0, storage_s(read_bytes, written_bytes, rates) / seconds)
    return StorageRates(rates.read_bytes_per_s * factor, rates.write_bytes_per_s * factor)


@dataclass(frozen=True)
class StepFloor:
    """The floor of one step, and the share of the step that the floor is: 1 is perfect."""

    floor_s: float
    fraction: float


class FloorMeter:
    """Follows a run: the fastest arithmetic and the best rates so far."""

    def __init__(self, rates: StorageRates | None) -> None:
        self.rates = rates
        self.arithmetic_s = math.inf

    def step(self, step_s: float, stalls_s: float, read_bytes: float, written_bytes: float) -> StepFloor:
        """Take in one step of `step_s` seconds, `stalls_s` of them waited; give its floor. 0 <= fraction <= 1."""
        self.arithmetic_s = min(self.arithmetic_s, max(0.0, step_s - stalls_s))
        if self.rates is not None:
            self.rates = at_least_as_seen(self.rates, read_bytes, written_bytes, step_s)
        floor = floor_s(self.arithmetic_s, read_bytes, written_bytes, self.rates)
        return StepFloor(floor, min(1.0, floor / step_s) if step_s > 0 else 1.0)

"""The order in which a training step uses the blocks, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Use:
    """One use of a block's parameters: `block` runs `phase`."""

    block: int
    phase: Phase


def step_uses(n_blocks: int) -> list[Use]:
    """Uses of one step in order: forward 0..L-1, then backward L-1..0."""
    forward = [Use(i, "forward") for i in range(n_blocks)]
    return forward + [Use(i, "backward") for i in reversed(range(n_blocks))]


class UseCursor:
    """Where the running step is in the endless repetition of `step_uses`; tolerant of skipped blocks."""

    def __init__(self, n_blocks: int) -> None:
        self._position_of = {use: p for p, use in enumerate(step_uses(n_blocks))}
        self._uses = step_uses(n_blocks)
        self._position = 0
        self._orders: dict[int, tuple[list[int], dict[int, int]]] = {}

    def at(self, use: Use) -> None:
        """Record that `use` begins now."""
        self._position = self._position_of[use]

    def rewind(self) -> None:
        """The next use is the first forward of a step."""
        self._position = len(self._uses) - 1

    def upcoming(self) -> list[int]:
        """Blocks in the order of their next use after the current one, each once."""
        return self._order_after(self._position)[0]

    def ranks(self) -> dict[int, int]:
        """Place of each block in `upcoming`."""
        return self._order_after(self._position)[1]

    def next_phase(self, block: int) -> Phase:
        """What `block` will be used for next."""
        now, forward, backward = self._position, block, len(self._uses) - 1 - block
        return "backward" if forward <= now < backward else "forward"

    def _order_after(self, position: int) -> tuple[list[int], dict[int, int]]:
        known = self._orders.get(position)
        if known is None:
            uses = self._uses[position + 1 :] + self._uses[: position + 1]
            order = list(dict.fromkeys(use.block for use in uses))
            known = (order, {block: rank for rank, block in enumerate(order)})
            self._orders[position] = known
        return known

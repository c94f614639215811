"""The order in which blocks are used: by a training step, and where forwards follow each other without a backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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

    kept: frozenset[int] = frozenset()
    kept_on_device: frozenset[int] = frozenset()
    """Blocks whose slots nothing that is brought in ahead of its use may take: see `ForwardCursor`."""

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

    def ahead(self) -> Iterator[Use]:
        """All uses in the order in which they come next; the current one last."""
        after = self._position + 1
        return itertools.chain(itertools.islice(self._uses, after, None), itertools.islice(self._uses, after))

    def upcoming(self) -> list[int]:
        """Blocks in the order of their next use after the current one, each once."""
        return self._order_after(self._position)[0]

    def ranks(self) -> dict[int, int]:
        """Place of each block in `upcoming`."""
        return self._order_after(self._position)[1]

    def uses_until(self, block: int, phase: Phase) -> int:
        """How many other uses come before `block` runs `phase` again."""
        position = block if phase == "forward" else len(self._uses) - 1 - block
        return (position - self._position - 1) % len(self._uses)

    def _order_after(self, position: int) -> tuple[list[int], dict[int, int]]:
        known = self._orders.get(position)
        if known is None:
            uses = self._uses[position + 1 :] + self._uses[: position + 1]
            order = list(dict.fromkeys(use.block for use in uses))
            known = (order, {block: rank for rank, block in enumerate(order)})
            self._orders[position] = known
        return known


STREAMING_SLOTS = 2
"""Slots through which blocks pass that are not kept: of the one that computes, and of the one that comes next."""


class ForwardCursor:
    """The same where forwards follow each other and no backward comes (evaluation, generation, a frozen model).

    [Note: kept in forwards] Blocks are used in a circle, and what has just been used is needed last. Were every slot
    filled with what comes next, each block would be gone before it comes round again, however many slots there are. So
    all slots but two keep their blocks, the same ones in every forward, and the others pass through the two.
    `kept` are those of host slots, `kept_on_device` those of device slots. Which block comes after which is what it was
    last: generation goes through a decoder many times, and once through its encoder.
    """

    def __init__(self, n_blocks: int, kept: frozenset[int], kept_on_device: frozenset[int]) -> None:
        self._n_blocks = n_blocks
        self._position = -1
        self._followed_by: dict[int, int] = {}
        self._ranks: dict[int, int] = {}
        self._orders: dict[int, dict[int, int]] = {}
        """Of every position that has been looked from, as long as blocks follow each other as they did."""
        self.kept, self.kept_on_device = kept, kept_on_device

    def at(self, use: Use) -> None:
        """Record that `use` begins now."""
        if self._followed_by.get(self._position) != use.block:
            self._followed_by[self._position] = use.block
            self._orders.clear()
        self._position = use.block
        if use.block not in self._orders:
            self._orders[use.block] = self._ranks_after(use.block)
        self._ranks = self._orders[use.block]

    def _ranks_after(self, position: int) -> dict[int, int]:
        ranks: dict[int, int] = {}
        block = self._next(position)
        while block not in ranks:
            ranks[block] = len(ranks)
            block = self._next(block)
        for i in range(self._n_blocks):
            ranks.setdefault((position + 1 + i) % self._n_blocks, len(ranks))
        return ranks

    def _next(self, block: int) -> int:
        return self._followed_by.get(block, (block + 1) % self._n_blocks)

    def ahead(self) -> Iterator[Use]:
        """The next use of every block, in the order in which they come."""
        return (Use(block, "forward") for block in self._ranks)

    def upcoming(self) -> list[int]:
        """Blocks in the order of their next use after the current one, each once."""
        return list(self._ranks)

    def ranks(self) -> dict[int, int]:
        """Place of each block in `upcoming`."""
        return self._ranks

    def uses_until(self, block: int, phase: Phase) -> int:
        """How many other uses come before `block` runs `phase` again; backward comes after all that is known of."""
        return self._n_blocks if phase == "backward" else self._ranks[block]


def kept_in_forwards(candidates: Sequence[int], n_slots: int) -> frozenset[int]:
    """Which of the blocks that `n_slots` are for are kept in them, one forward after the other: evenly spread, so that
    there is time to bring the others."""
    n, n_kept = len(candidates), max(0, n_slots - STREAMING_SLOTS)
    if n_slots >= n:
        return frozenset(candidates)
    return frozenset(candidates[(2 * i + 1) * n // (2 * n_kept)] for i in range(n_kept))

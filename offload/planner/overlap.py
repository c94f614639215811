"""How long things take that overlap: numbers or numpy arrays. Formulas: docs/planner.md."""

from __future__ import annotations

from typing import Any

import numpy as np

OVERLAP_ORDER = 8.0
"""Found by simulating: how much longer a phase is than its busiest resource. docs/planner.md, what was tried."""


def overlapped(busy_s: list[Any], order: float) -> Any:
    """Time of things that overlap: the longest where it stands alone, somewhat more where a second one is nearly as
    long (9 % for two equal ones at order 8), because each then waits for the other now and then. An infinite order is
    the longest alone."""
    if np.isinf(order):
        longest: Any = busy_s[0]
        for seconds in busy_s[1:]:
            longest = np.maximum(longest, seconds)
        return longest
    total: Any = 0.0
    for seconds in busy_s:
        total = total + _power(np.asarray(seconds), order)
    return _root(total, order)


def _power(base: Any, order: float) -> Any:
    """`base ** order` of non-negative numbers. Products take a small part of the time that numpy's power takes."""
    while order > 1 and order % 2 == 0:
        base, order = base * base, order / 2
    return base if order == 1 else base**order


def _root(base: Any, order: float) -> Any:
    """`base ** (1 / order)` of non-negative numbers, as quickly."""
    while order > 1 and order % 2 == 0:
        base, order = np.sqrt(base), order / 2
    return base if order == 1 else base ** (1 / order)

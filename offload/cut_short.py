"""Ctrl-C in the middle of what the engine does with blocks.

[Note: cut short] Python raises KeyboardInterrupt between any two operations of the main thread, the engine's too: a
transfer has begun and nobody has its ticket, a buffer has an owner and not yet its content. A run that went on would
compute with that, or end in an error that names something else. So what was cut short there is noted, and refuses to be
used. Most of the time goes into waits, and a forward's may be left: afterwards everything is as it was before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])

_LEFT_A_WAIT = "_offload_left_a_wait"


class MayBeCutShort:
    """Whose methods are decorated with `whole`."""

    is_cut_short = False
    """One of them was left in the middle."""


def whole(method: _Method) -> _Method:
    """Note when the method is left by KeyboardInterrupt, or whatever else is no Exception."""
    return _noting(method, waits=False)


def whole_but_for_waits(method: _Method) -> _Method:
    """The same, but a wait inside may be left."""
    return _noting(method, waits=True)


def _noting(method: _Method, *, waits: bool) -> _Method:
    @functools.wraps(method)
    def noting(self: MayBeCutShort, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            if not (waits and hasattr(error, _LEFT_A_WAIT)):
                self.is_cut_short = True
            raise

    return noting  # type: ignore[return-value]  # takes and gives what the method does


@contextmanager
def leavable() -> Iterator[None]:
    """Inside is a wait, for which nothing has been begun that it does not end."""
    try:
        yield
    except KeyboardInterrupt as error:
        setattr(error, _LEFT_A_WAIT, True)
        raise


class Used(Protocol):
    """A block's counts of its uses."""

    in_use: int
    host_in_use: int


@contextmanager
def begun_or_not(block: Used) -> Iterator[None]:
    """Inside a use of the block begins: where that fails it has not begun, and nobody will end it."""
    before = block.in_use, block.host_in_use
    try:
        yield
    except BaseException:
        block.in_use, block.host_in_use = before
        raise

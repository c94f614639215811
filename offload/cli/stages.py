"""What a command that takes seconds is doing, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stages(first: str) -> Iterator[Callable[[str], None]]:
    """While entered, `first` and then what the yielded function is given are told in one line on stderr, which is gone
    at the end. Nothing where stderr is no terminal."""
    from rich.console import Console

    with Console(stderr=True).status(f"{first} ...") as status:
        yield lambda text: status.update(f"{text} ...")

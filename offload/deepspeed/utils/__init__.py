"""`deepspeed.utils`: its logger, and what has an answer in one process."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from offload.deepspeed import elsewhere

__all__ = ["RepeatingLoader", "log_dist", "logger", "set_z3_leaf_modules"]

logger = logging.getLogger("offload")


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log `message` where rank 0, or every rank (None, -1), is among `ranks`."""
    if ranks is None or 0 in ranks or -1 in ranks:
        logger.log(level, "[Rank 0] %s", message)


class RepeatingLoader:
    """Goes through `loader` again and again, without end. Raises StopIteration for one that is empty."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
        return next(self.data_iter)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Accepted and not needed: a block's parameters are all there while it computes. Returns the modules meant.

    `leaf_module_classes` are classes or their names. Raises ValueError where the model has none of them.
    """
    names = {kind if isinstance(kind, str) else kind.__name__ for kind in leaf_module_classes}
    found = [
        module
        for module in model.modules()
        if names & {type(module).__name__, f"{type(module).__module__}.{type(module).__qualname__}"}
    ]
    if not found and raise_if_not_found:
        raise ValueError(f"the model has no module of {sorted(names)}")
    return found


def __getattr__(name: str) -> Any:
    """Say what to do instead of what DeepSpeed's package has and this one has not."""
    raise AttributeError(elsewhere.says(f"utils.{name}", __all__))

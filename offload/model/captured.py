"""What leaves a block beside its return value: tensors that transformers collects by hooks on modules inside.

Router logits (of whose auxiliary loss the router learns) and attention weights are appended to lists of the collector
that is active during the model's forward. A block runs as one autograd node, so for it they have to be results like
the others: `apart` collects them in lists of the block's own, and `hand_on` appends the node's results to the model's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from offload.errors import UsageError


def _collector() -> Any:
    module = sys.modules.get("transformers.utils.output_capturing")
    return getattr(module, "_active_collector", None)


def wanted_keys() -> tuple[str, ...]:
    """What the model that is running collects from inside its blocks. Hidden states are taken between them."""
    collector = _collector()
    lists = None if collector is None else collector.get()
    return tuple(k for k in lists or () if k != "hidden_states" and not k.startswith("_"))


@contextmanager
def apart(keys: tuple[str, ...]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Inside, tensors are collected under `keys` in the dictionary that is given, and nowhere else."""
    collected: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    collector = _collector() if keys else None
    if collector is None:
        yield collected
        return
    token = collector.set(collected)
    try:
        yield collected
    finally:
        collector.reset(token)


def hand_on(collected: dict[str, list[torch.Tensor]]) -> None:
    """Append to what the running model has collected so far."""
    for key, tensors in collected.items():
        _collector().get()[key].extend(tensors)


def without_cache(block_name: str, leaves: list[Any]) -> list[Any]:
    """The leaves of a block's call without an empty key-value cache, which would grow twice when the block recomputes.

    Raises UsageError for a cache that holds something: such a call cannot be repeated.
    """
    kept = []
    for leaf in leaves:
        length = getattr(leaf, "get_seq_length", None)
        if callable(length):
            if int(length()) > 0:
                raise UsageError(
                    f"block {block_name} was called with gradients and a cache of {int(length())} tokens (as prefix "
                    "tuning does): a block runs again in backward, and the cache would change in between"
                )
            leaf = None
        kept.append(leaf)
    return kept

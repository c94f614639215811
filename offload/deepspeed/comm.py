"""`deepspeed.comm` of a single process, for scripts that ask who they are."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.distributed import ReduceOp as ReduceOp

logger = logging.getLogger("offload")


def init_distributed(*_args: Any, **_settings: Any) -> None:
    """Accepted and not needed: this library trains in one process."""
    logger.info("init_distributed has no effect: one process")


def is_initialized() -> bool:
    """True: the group of one process is always there."""
    return True


def get_rank(group: Any = None) -> int:
    """0."""
    return 0


def get_local_rank() -> int:
    """0."""
    return 0


def get_world_size(group: Any = None) -> int:
    """1."""
    return 1


def barrier(*_args: Any, **_settings: Any) -> None:
    """Nobody to wait for."""


def all_reduce(tensor: torch.Tensor, *_args: Any, **_settings: Any) -> None:
    """The sum, mean or maximum over one process: `tensor` stays as it is."""


def broadcast(tensor: torch.Tensor, *_args: Any, **_settings: Any) -> None:
    """From the only process to itself: `tensor` stays as it is."""


def reduce(tensor: torch.Tensor, *_args: Any, **_settings: Any) -> None:
    """As `all_reduce`: `tensor` stays as it is."""


def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, *_args: Any, **_settings: Any) -> None:
    """`tensor` of the only process, copied into the only place of `tensor_list`."""
    tensor_list[0].copy_(tensor)


def all_gather_into_tensor(
    output_tensor: torch.Tensor, tensor: torch.Tensor, *_args: Any, **_settings: Any
) -> None:
    """`tensor` of the only process, copied into `output_tensor`."""
    output_tensor.copy_(tensor.view_as(output_tensor))


def all_gather_object(object_list: list[Any], obj: Any, *_args: Any, **_settings: Any) -> None:
    """`obj` of the only process, in the only place of `object_list`."""
    object_list[0] = obj


def broadcast_object_list(object_list: list[Any], *_args: Any, **_settings: Any) -> None:
    """From the only process to itself: `object_list` stays as it is."""


def is_available() -> bool:
    """True."""
    return True


def destroy_process_group(group: Any = None) -> None:
    """There is none to destroy."""


def __getattr__(name: str) -> Any:
    """Say what to do instead of what DeepSpeed's module has and this one has not."""
    raise AttributeError(
        f"offload.deepspeed.comm has no {name}: in one process every tensor is whole, leave it out"
    )

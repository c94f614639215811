"""`deepspeed.comm` and `deepspeed.get_accelerator` of a single process, for scripts that ask who they are."""

from __future__ import annotations

import functools
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


class Accelerator:
    """The device that blocks are computed on when `offload.device` does not say otherwise: CUDA if there is one."""

    _name = property(lambda self: "cuda" if torch.cuda.is_available() else "cpu")

    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda", "cuda:1", or "cpu" for any index."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    current_device_name = device_name

    def current_device(self) -> int:
        """Index of the device."""
        return torch.cuda.current_device() if torch.cuda.is_available() else 0

    def set_device(self, device_index: int) -> None:
        """Choose a CUDA device; nothing on a CPU."""
        if torch.cuda.is_available():
            torch.cuda.set_device(device_index)

    def device_count(self) -> int:
        """Devices there are, at least 1."""
        return max(1, torch.cuda.device_count())

    def communication_backend_name(self) -> str:
        """ "nccl" or "gloo"."""
        return "nccl" if torch.cuda.is_available() else "gloo"

    def is_available(self) -> bool:
        """True."""
        return True

    def is_bf16_supported(self) -> bool:
        """Whether bf16 is computed with."""
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        """True: under torch.autocast."""
        return True

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize(device_index)

    def empty_cache(self) -> None:
        """Give memory that torch has cached back to the device."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def manual_seed_all(self, seed: int) -> None:
        """Seed every device."""
        torch.manual_seed(seed)

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes of device memory that torch's tensors take."""
        return torch.cuda.memory_allocated(device_index) if torch.cuda.is_available() else 0

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most that `memory_allocated` has been."""
        return torch.cuda.max_memory_allocated(device_index) if torch.cuda.is_available() else 0


@functools.cache
def get_accelerator() -> Accelerator:
    """What `deepspeed.get_accelerator` gives."""
    return Accelerator()

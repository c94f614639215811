"""`deepspeed.accelerator`: the device, by the names that DeepSpeed has for what can be done with one."""

from __future__ import annotations

import functools

import torch


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

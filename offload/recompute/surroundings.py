"""What a block runs in besides its arguments and state: modes of its modules, autocast, torch's global settings.

Backward runs a block again in what its forward ran in, whatever has been called in between (`model.eval()`, the end of
an `autocast` or `sdpa_kernel` context, `torch.set_default_dtype`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from offload.recompute.module_hooks import numbers_of

_C: Any = torch._C


def _deterministic() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def _set_deterministic(value: tuple[bool, bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    torch.utils.deterministic.fill_uninitialized_memory = value[2]  # type: ignore[attr-defined]


def _or_none(get: Callable[[], Any]) -> Callable[[], Any]:
    """What `get` gives, None where the user has set it by newer names, which it does not know."""

    def asked() -> Any:
        try:
            return get()
        except RuntimeError:
            return None

    return asked


def _unless_none(set_: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda value: None if value is None else set_(value)


def _switch(owner: Any, get: str, set_: str) -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """A setting of torch's C++ side, where this version has it."""
    return (
        [(getattr(owner, get), getattr(owner, set_))] if hasattr(owner, get) and hasattr(owner, set_) else []
    )


_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (_deterministic, _set_deterministic),
    (_or_none(torch.get_float32_matmul_precision), _unless_none(torch.set_float32_matmul_precision)),
    *[
        (_or_none(g), _unless_none(s))
        for g, s in _switch(_C, "_get_cudnn_allow_tf32", "_set_cudnn_allow_tf32")
    ],
    *_switch(_C, "_get_cudnn_enabled", "_set_cudnn_enabled"),
    *_switch(_C, "_get_cudnn_benchmark", "_set_cudnn_benchmark"),
    *_switch(_C, "_get_cudnn_deterministic", "_set_cudnn_deterministic"),
    *_switch(_C, "_get_mkldnn_enabled", "_set_mkldnn_enabled"),
    *_switch(_C, "_get_flash_sdp_enabled", "_set_sdp_use_flash"),
    *_switch(_C, "_get_mem_efficient_sdp_enabled", "_set_sdp_use_mem_efficient"),
    *_switch(_C, "_get_math_sdp_enabled", "_set_sdp_use_math"),
    *_switch(_C, "_get_cudnn_sdp_enabled", "_set_sdp_use_cudnn"),
    *_switch(_C, "_get_overrideable_sdp_enabled", "_set_sdp_use_overrideable"),
    *_switch(_C, "_get_sdp_priority_order", "_set_sdp_priority_order"),
]
_GETTERS = [get for get, _ in _SETTINGS]
_training = attrgetter("training")


@dataclass(frozen=True)
class Surroundings:
    """What a block's forward runs in."""

    training: tuple[bool, ...]
    """Whether each of its modules is in the mode of training."""
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    settings: tuple[Any, ...]
    hooks: int
    """A sum of their numbers, which are given once: a recipe may skip what other hooks read."""
    devices: tuple[torch.device, ...]
    """Those that `with torch.device(...)` gives tensors without a device, inmost last."""

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """What may decide which operations the block does."""
        return self.training, self.autocast, str(self.settings), self.hooks, self.devices


def now(modules: Sequence[nn.Module], device: torch.device) -> Surroundings:
    """As it is. Autocast: of `device`, and of the CPU, where a block may do a part of its work."""
    return _now(modules, device, numbers_of(modules))


def _now(modules: Sequence[nn.Module], device: torch.device, hooks: int) -> Surroundings:
    kinds = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
    modes = _get_current_function_mode_stack()
    return Surroundings(
        tuple(map(_training, modules)),
        tuple([(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]),
        tuple([get() for get in _GETTERS]),
        hooks,
        tuple([mode.device for mode in modes if isinstance(mode, DeviceContext)]),
    )


@contextmanager
def again(before: Surroundings, modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, it is as it was `before`; autocast without its cache."""
    found = _now(modules, device, before.hooks)  # those that are there now run as they are
    with ExitStack() as stack:
        stack.callback(_put, modules, before, found)
        _put(modules, found, before)
        for current, (kind, enabled, dtype) in zip(found.autocast, before.autocast, strict=True):
            if current != (kind, enabled, dtype):
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
        if before.devices and before.devices != found.devices:
            stack.enter_context(before.devices[-1])
        yield


def _put(modules: Sequence[nn.Module], found: Surroundings, wanted: Surroundings) -> None:
    if found.training != wanted.training:
        for module, flag in zip(modules, wanted.training, strict=True):
            module.training = flag
    if found.settings != wanted.settings:
        for (get, set_), value in zip(_SETTINGS, wanted.settings, strict=True):
            if get() != value:
                set_(value)

"""Parameters that the engine owns: what is written into one from outside is told from what the library itself does.

[Note: guarded parameters] A parameter's bytes are views of memory that the engine moves. What a loop writes there
(`p.data.clamp_()`, `p.copy_()` without gradients, a renormalising embedding) is lost with the next eviction, is undone
by an update that is under way, or misses the master. Torch counts writes in place in `_version`, except those through
`p.data`, which is a tensor with a count of its own, and puts another tensor under the parameter when `p.data` is set.
So while an engine owns a parameter it is of a class of its own, of the same name, whose `data` counts with the
parameter, and cannot be set. The library writes planes, never parameters, and moves them by `put`, which torch does not
count: every count that has changed is the user's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from offload.errors import UsageError

_data: Any = torch.Tensor.data
_NAME = "_offload_guarded_as"

_NO_WRITES = ("requires_grad_", "share_memory_", "detach_", "rename_", "is_shared_")
"""Methods whose names look as if they wrote values."""

REMEDY = "Change parameters before offload.wrap, or between two steps with offload.change(model, function)"


def put(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Let the parameter's data be `tensor`, whatever class it is of."""
    _data.__set__(parameter, tensor)


def guard(parameter: torch.Tensor, name: str) -> None:
    """Refuse that `data` be set, and count what is written through it, until `release`. `name`: for the message."""
    if _NAME not in parameter.__dict__:
        setattr(parameter, _NAME, name)
        parameter.__class__ = _guarded(type(parameter))


def release(parameters: Iterable[torch.Tensor]) -> None:
    """Let every parameter be of its own class again."""
    for parameter in parameters:
        if parameter.__dict__.pop(_NAME, None) is not None:
            parameter.__class__ = type(parameter).__mro__[1]


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        isinstance(b, torch.Tensor)
        and (a.device, a.dtype, a.shape, a.stride()) == (b.device, b.dtype, b.shape, b.stride())
        and a.data_ptr() == b.data_ptr()
    )


@functools.cache
def _guarded(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """A subclass of `kind`, under its name, whose `data` cannot be set and counts what is written through it."""

    def read(parameter: torch.Tensor) -> torch.Tensor:
        if _NAME not in parameter.__dict__ or torch.compiler.is_compiling() or parameter.is_inference():
            found: torch.Tensor = _data.__get__(parameter)
            return found
        found = parameter.detach()
        if _is_away(parameter):
            found = found.as_subclass(_unwritable(torch.Tensor))
            setattr(found, _NAME, parameter.__dict__[_NAME])
        return found

    def write(parameter: torch.Tensor, value: torch.Tensor) -> None:
        name = parameter.__dict__.get(_NAME)
        if name is not None and not _is_same(parameter, value):
            raise UsageError(
                f"{name}: its data cannot be set (by assignment, model.to(), .half() or .float()), because it lives in "
                f"the tiers of a run, which would go on with the old values. {REMEDY}"
            )
        _data.__set__(parameter, value)

    def set_(parameter: torch.Tensor, source: Any, *more: Any) -> torch.Tensor:
        if _NAME not in parameter.__dict__:
            own: Any = kind.set_
            return own(parameter, source, *more)
        write(parameter, source)
        return parameter

    def share_memory_(parameter: torch.Tensor) -> torch.Tensor:
        name = parameter.__dict__.get(_NAME)
        if name is not None:
            raise UsageError(
                f"{name}: share_memory() would move the memory that storage and updates of this run go on using. Give "
                "other processes model.state_dict(), or what offload.export writes"
            )
        return kind.share_memory_(parameter)

    def refuse_to_copy(parameter: torch.Tensor) -> None:
        if _NAME in parameter.__dict__ and _is_away(parameter):
            raise UsageError(
                f"{parameter.__dict__[_NAME]} of a wrapped model cannot be copied or pickled: its values are in the "
                "tiers, and here only while its block computes. Copy it before offload.wrap; afterwards "
                "model.state_dict() has copies of the real ones, and offload.export and offload.save write them"
            )

    def __deepcopy__(parameter: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        refuse_to_copy(parameter)
        own: Any = kind
        copied: torch.Tensor = own.__deepcopy__(parameter, memo)
        if _NAME not in copied.__dict__ and issubclass(type(copied), kind):
            copied.__class__ = kind
        return copied

    def __reduce_ex__(parameter: torch.Tensor, protocol: Any) -> Any:
        refuse_to_copy(parameter)
        return kind.__reduce_ex__(parameter, protocol)

    members = {**_refusing_writes(kind), "__deepcopy__": __deepcopy__, "__reduce_ex__": __reduce_ex__}
    members |= {"data": property(read, write), "set_": set_, "share_memory_": share_memory_}
    return _subclass(kind, members)


@functools.cache
def _unwritable(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """What `data` of a parameter is that is not where it could be written to; what it gives are plain tensors."""
    members = {**_refusing_writes(kind), "__torch_function__": torch._C._disabled_torch_function_impl}
    return _subclass(kind, members)


def _subclass(kind: type[torch.Tensor], members: dict[str, Any]) -> type[torch.Tensor]:
    return type(
        kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__, **members}
    )


def _is_away(parameter: torch.Tensor) -> bool:
    """Whether its values are elsewhere at the moment: then it is one element seen at its shape."""
    return parameter.numel() > 1 and not any(parameter.stride())


def _refusing_writes(kind: type[torch.Tensor]) -> dict[str, Any]:
    """The methods of `kind` that write in place, with the remedy in their refusal where torch's own has none."""

    def of(name: str) -> Any:
        own = getattr(kind, name)

        @functools.wraps(own)
        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if _NAME in tensor.__dict__ and _is_away(tensor):
                raise UsageError(
                    f"{tensor.__dict__[_NAME]}: cannot be written to between steps ({name}): its values are in the "
                    f"tiers, and here only while its block computes. {REMEDY}"
                )
            return own(tensor, *args, **kwargs)

        return method

    names = [
        n for n in dir(torch.Tensor) if n.endswith("_") and not n.endswith("__") and not n.startswith("_")
    ]
    operators = ["__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"]
    return {name: of(name) for name in [*names, *operators] if name not in _NO_WRITES}

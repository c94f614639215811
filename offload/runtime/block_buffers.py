"""What a block's forward leaves in its buffers (running statistics, power iterations, counters), as if it ran once.

[Note: buffers that forward changes] A block runs again in backward. A buffer that its forward changes would be changed
twice a step, and what runs again would start from values that the first run has changed. So recomputation finds these
buffers as this very call (and micro-batch) of forward found them, and leaves them as they are by then. The first
forward in a mode of training tells which they are: all buffers are copied before it, and before later ones those that
it has changed in place, as their version or their values show. One that is replaced by another tensor needs no
copy. A block that changes no buffer pays a look at the versions of those that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.errors import UsageError

_ABSENT: Any = object()
"""In place of a buffer that is not registered."""

_Key = tuple[int, str]
"""Position of a module in its block, and the buffer's name there."""


@dataclass(frozen=True)
class Buffer:
    """What is under a buffer's name in its module, and what that tensor holds (None: forward leaves it as it is)."""

    owner: dict[str, torch.Tensor | None]
    name: str
    tensor: Any
    values: torch.Tensor | None


@dataclass(frozen=True)
class Seen:
    """A block's buffers before its forward: tensors, their versions, and copies of those that it may change."""

    mode: tuple[bool, ...]
    tensors: Mapping[_Key, torch.Tensor | None]
    versions: Mapping[_Key, int]
    values: Mapping[_Key, torch.Tensor]


_NOTHING = Seen((), {}, {}, {})


def _version(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:  # of a dtype or layout that cannot be compared
        return False


class BlockBuffers:
    """The buffers of one block. See [Note: buffers that forward changes]."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._paths = [path for path, _ in module.named_modules()]
        self._modules = list(module.modules())
        self._owners = [each._buffers for each in self._modules]
        self._changes: dict[tuple[bool, ...], dict[_Key, bool]] = {}
        """Whether forward changes a buffer in place, by which of its modules are in training."""

    def look(self) -> Seen:
        """Before forward."""
        if not any(self._owners):
            return _NOTHING
        tensors = {(i, n): t for i, owner in enumerate(self._owners) if owner for n, t in owner.items()}
        mode = tuple(module.training for module in self._modules)
        changes = self._changes.setdefault(mode, {})
        with torch.no_grad():
            values = {
                key: t.clone() for key, t in tensors.items() if t is not None and changes.get(key, True)
            }
        return Seen(mode, tensors, {key: _version(t) for key, t in tensors.items()}, values)

    def changed_since(self, seen: Seen) -> list[Buffer]:
        """After forward: what recomputation has to find in the buffers that were changed. Raises UsageError for a
        change in place that forward has not made before in this mode, because the values before it are gone."""
        if seen is _NOTHING and not any(self._owners):
            return []
        new = [(i, n) for i, owner in enumerate(self._owners) for n in owner if (i, n) not in seen.tensors]
        before = [Buffer(self._owners[i], name, _ABSENT, None) for i, name in new]
        changes = self._changes.get(seen.mode, {})
        for key, tensor in seen.tensors.items():
            owner, name, values = self._owners[key[0]], key[1], seen.values.get(key)
            if tensor is not None:
                in_place = _version(tensor) != seen.versions[key]
                if key not in changes and values is not None:
                    in_place = in_place or not _same_values(tensor, values)
                changes[key] = in_place or changes.get(key, False)
                if in_place and values is None:
                    path = ".".join(filter(None, (self._name, self._paths[key[0]], name)))
                    raise UsageError(
                        f"forward has changed the buffer {path} in place, which it did not do when it ran first: it "
                        "runs again in backward, and needs what the buffer held before. Keep the graph instead, with "
                        "activations='keep'"
                    )
            if values is not None and not changes[key]:
                values = None
            if values is not None or owner.get(name, _ABSENT) is not tensor:
                before.append(Buffer(owner, name, tensor, values))
        return before

    @staticmethod
    def now(buffers: list[Buffer]) -> list[Buffer]:
        """The same ones as they are."""
        found = []
        for buffer in buffers:
            tensor = buffer.owner.get(buffer.name, _ABSENT)
            copied = buffer.values is not None and isinstance(tensor, torch.Tensor)
            values = tensor.detach().clone() if copied else None
            found.append(Buffer(buffer.owner, buffer.name, tensor, values))
        return found

    @staticmethod
    def put(buffers: list[Buffer]) -> None:
        """Let them be so again. Graphs that have saved one do not see it: it is what it was when they need it."""
        for buffer in buffers:
            if buffer.tensor is _ABSENT:
                buffer.owner.pop(buffer.name, None)
                continue
            buffer.owner[buffer.name] = buffer.tensor
            if buffer.values is not None:
                keep_version = torch.autograd.grad_mode._unsafe_preserve_version_counter(buffer.tensor)
                with torch.no_grad(), keep_version:
                    buffer.tensor.copy_(buffer.values)

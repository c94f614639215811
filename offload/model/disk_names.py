"""Names and shapes that tensors have in a directory, where transformers keeps them otherwise than the model does.

Some architectures hold in one tensor what their directories hold in several (the experts of a layer), or under other
names. transformers knows how to go from one to the other; here it is asked for a few tensors at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Read = Callable[[str], torch.Tensor]


def _converter(model: nn.Module) -> Any:
    """The module that converts, for a model of transformers; nobody else's models are converted."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    return sys.modules.get("transformers.core_model_loading")


def to_directory(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors (real or on the meta device) as a directory of this model has them.

    All parts of what is converted together have to be among `tensors`, as those of one block are.
    """
    loading = _converter(model)
    if loading is None:
        return tensors
    converted: dict[str, torch.Tensor] = loading.revert_weight_conversion(model, tensors)
    return converted


@dataclass
class Source:
    """Where one tensor of the model comes from: `parts` are (name in the directory, pattern that it matches)."""

    name: str
    transform: Any = None
    parts: list[tuple[str, str]] = field(default_factory=list)

    def read(self, model: nn.Module, read: Read) -> torch.Tensor:
        """The tensor, made of what `read` brings by name."""
        transform = deepcopy(self.transform)
        for part, pattern in self.parts:
            transform.add_tensor(self.name, part, pattern, read(part))
        values = transform.convert(self.name, model=model, config=model.config)
        value = values[self.name]
        made: torch.Tensor = value[0] if isinstance(value, list) else value
        return made


def sources(model: nn.Module, names: Iterable[str]) -> dict[str, Source]:
    """By name in the model, what has another name or shape among the `names` of a directory."""
    loading: Any = _converter(model)
    if loading is None:
        return {}
    transforms = sys.modules["transformers.conversion_mapping"].get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted |= {name: True for name, _ in model.named_buffers()}
    found: dict[str, Source] = {}
    for name in sorted(names, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(
            name, renamings, converters, str(model.base_model_prefix), wanted
        )
        if target == name:
            continue
        source = found.setdefault(target, Source(target))
        if source.transform is None:
            source.transform = (
                loading.WeightRenaming(name, target) if pattern is None else by_pattern[pattern]
            )
        source.parts.append((name, name if pattern is None else pattern))
    return found

"""Training state that is not in blocks: hyperparameters, step counts, random states, and what the user tracks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from offload.errors import CheckpointError, OffloadError, UsageError
from offload.runtime.optimizer import OffloadOptimizer
from offload.stores.block_store import BlockRecord


@runtime_checkable
class Stateful(Protocol):
    """Whatever can say where it is and go back there: LR schedulers, data loaders, samplers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Saving(Protocol):
    """A checkpoint that is being written while training goes on."""

    def start(self) -> None: ...
    def before_update(self, block: BlockRecord) -> None: ...
    def wait(self) -> None: ...
    def give_up(self) -> None: ...
    @property
    def done(self) -> bool: ...
    @property
    def read_nbytes(self) -> int: ...


def random_states() -> dict[str, Any]:
    """Of torch (CPU and every CUDA device in use), numpy and Python."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_gpu else [],
        "numpy": (kind, np.asarray(keys), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Undo whatever has been drawn since `random_states`. A GPU that is not there any more is left out."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def checked_stateful(tracked: Mapping[str, Any]) -> dict[str, Stateful]:
    """`tracked` as it is. Raises UsageError for what has no state_dict and load_state_dict."""
    for name, item in tracked.items():
        if not isinstance(item, Stateful):
            raise UsageError(
                f"{name} is a {type(item).__name__} without state_dict() and load_state_dict(): its position cannot be "
                "saved. Schedulers and stateful data loaders have both; give a small object of yours two such methods"
            )
    return dict(tracked)


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a state_dict would hold, such as running means."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {name for name, _ in model.named_buffers()} - parameters
    if not names:
        return {}
    owners = dict(model.named_modules())
    kept: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        owner, _, leaf = name.rpartition(".")
        if leaf not in owners[owner]._non_persistent_buffers_set:
            kept[name] = owners[owner]._buffers[leaf]
    return kept


def training_state(
    model: nn.Module, optimizer: OffloadOptimizer, tracked: Mapping[str, Stateful]
) -> dict[str, Any]:
    """All of it, as plain data and tensors."""
    return {
        "optimizer": optimizer.hyperparameters(),
        **optimizer.statistics(optimizer.all_steps()),
        "random": random_states(),
        "buffers": persistent_buffers(model),
        "tracked": {name: item.state_dict() for name, item in tracked.items()},
    }


def load_training_state(
    state: Any, model: nn.Module, optimizer: OffloadOptimizer, tracked: Mapping[str, Stateful], where: str
) -> None:
    """Put everything back. Raises CheckpointError when `state` is none of `training_state`, or lacks a name."""
    try:
        missing = sorted(set(tracked) - set(state["tracked"]))
        if missing:
            raise CheckpointError(
                f"{where}: has no state of {', '.join(missing)}; it has that of {sorted(state['tracked'])}"
            )
        buffers = persistent_buffers(model)
        if buffers.keys() != state["buffers"].keys():
            raise CheckpointError(f"{where}: its buffers are not those of this model")
        optimizer.set_hyperparameters(state["optimizer"], where)
        if optimizer.adafactor is not None:
            optimizer.adafactor.set_state(state["adafactor"], where)
        for name, item in tracked.items():
            item.load_state_dict(state["tracked"][name])
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(state["buffers"][name])
        set_random_states(state["random"])
    except OffloadError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{where}: its training state is malformed: {error!r}") from error

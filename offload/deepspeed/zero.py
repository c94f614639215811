"""`deepspeed.zero` for scripts whose import was changed: nothing is sharded here, so most of it has nothing to do.

`Init` makes the model where it would be made anyway. `GatheredParameters` shows whole parameters, before `initialize`
because they are whole, after it by reading them from where they live.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from offload.deepspeed.partition import ZeroParamStatus as ZeroParamStatus
from offload.deepspeed.partition import mark, set_status
from offload.errors import UsageError
from offload.model import guarded
from offload.runtime.engine import OffloadEngine
from offload.stores.block_store import BlockRecord

logger = logging.getLogger("offload")

_engines: weakref.WeakSet[OffloadEngine] = weakref.WeakSet()


def remember(engine: OffloadEngine, stage: int) -> None:
    """Let `GatheredParameters` find the engine's parameters; at stage 3 they say that they are to be gathered."""
    _engines.add(engine)
    if stage == 3:
        mark(engine)


class Init:
    """The model is made in host memory, in the dtype its code says, and moves at `initialize`. Arguments are accepted.

    For a model larger than host memory use `offload.transformers.load_model`, which leaves parameters in their files.
    """

    def __init__(self, module: nn.Module | None = None, *_args: Any, **_settings: Any) -> None:
        del module
        logger.info("deepspeed.zero.Init has no effect: nothing is sharded; initialize moves the parameters")

    def __enter__(self) -> Init:
        return self

    def __exit__(self, *_raised: object) -> None:
        pass


class GatheredParameters:
    """Inside the `with` block, `params` (one or several) hold their values. Each takes its own host memory meanwhile.

    Before `initialize` they always do, and changes stay. After it they are copies of what the next step computes with:
    a change raises UsageError on leaving, whatever `modifier_rank` says, because the masters live with the optimizer.
    """

    def __init__(
        self,
        params: Any,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        del modifier_rank, fwd_module
        self._params = [params] if isinstance(params, torch.Tensor) else list(params)
        self._enabled = enabled
        self._before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._bound: dict[int, BlockRecord] = {}
        """By id() of a shown parameter: its block, where that was computed with in place when it was shown."""

    def __enter__(self) -> None:
        if not self._enabled:
            return
        for parameter, value, block in _values(self._params):
            shown = value.clone()
            self._before.append((parameter, parameter.data, value, shown))
            if block.is_bound:
                self._bound[id(parameter)] = block
            guarded.put(parameter, shown)
            set_status(parameter, ZeroParamStatus.AVAILABLE)
        for block in self._bound.values():  # who computes with it meanwhile has to bind it again
            block.is_bound = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before, self._before = self._before, []
        bound, self._bound = self._bound, {}
        changed = [tuple(shown.shape) for _, _, value, shown in before if not torch.equal(shown, value)]
        for parameter, data, _, shown in before:
            set_status(parameter, ZeroParamStatus.NOT_AVAILABLE)
            if parameter.data_ptr() == shown.data_ptr():  # else a forward inside has fetched it
                guarded.put(parameter, data)
                if id(parameter) in bound:
                    bound[id(parameter)].is_bound = True
        if changed and kind is None:
            raise UsageError(
                f"GatheredParameters: a parameter of shape {changed[0]} was changed after initialize, which is not "
                "kept: change parameters before deepspeed.initialize, or load a checkpoint with engine.load_checkpoint"
            )


def _values(params: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, BlockRecord]]:
    """(parameter, a copy of its value, its block) of those that live in an engine, each block read once."""
    wanted = {id(parameter): parameter for parameter in params}
    found: list[tuple[torch.Tensor, torch.Tensor, BlockRecord]] = []
    for engine in list(_engines):
        owned = {
            segment.name: (segment.parameter, block)
            for block in [engine.root, *engine.blocks]
            for buffer in block.layout.buffers
            for segment in buffer.segments
            if id(segment.parameter) in wanted
        }
        if not owned or engine.closed:
            continue
        for block in engine.iter_blocks():
            found += [
                (parameter, tensor.clone(), record)
                for name, tensor in block
                if name in owned
                for parameter, record in [owned[name]]
            ]
    return found


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Accepted and not needed: a parameter that another block's forward reads is followed by itself."""
    del module, parameter


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Accepted and not needed."""
    del module, parameter

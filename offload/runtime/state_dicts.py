"""What `state_dict` of a wrapped model, and of any module of it, gives: copies of the real values, block by block.

A parameter holds its values only while its block is in use, and an update may be under way in them. So each module's
own parameters are read from their blocks, with every decided update made, as the module says its state. Modules say it
in the order of the blocks, which are then read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload.config import host_available_nbytes
from offload.errors import BudgetError, UsageError
from offload.model.flat import FlatBuffer, Segment
from offload.runtime.scheduler import Scheduler
from offload.stores.block_store import BlockRecord


class Uncopied:
    """What a copy of a model would have to share with it: copy and pickle refuse it."""

    def __reduce_ex__(self, protocol: object) -> Any:
        """Raises UsageError."""
        raise UsageError(
            "a wrapped model, or a part of it, cannot be copied or pickled: its parameters live in the memory and on "
            "the drives of one engine. Copy it before offload.wrap; afterwards give model.state_dict() to a model made "
            "anew (for averages too), or write it with offload.export or offload.save"
        )


class StateDicts(Uncopied):
    """Fills state dicts for the hooks of `hooks.on_state_dict`, which are in every module and go where it goes."""

    def __init__(
        self, model: nn.Module, scheduler: Scheduler, refuse_unless_open: Callable[[], None]
    ) -> None:
        self._scheduler, self._refuse_unless_open = scheduler, refuse_unless_open
        self._places: dict[int, tuple[BlockRecord, FlatBuffer, Segment]] = {
            id(segment.parameter): (block, buffer, segment)
            for block in [scheduler.root, *scheduler.blocks]
            for buffer in block.layout.buffers
            for segment in buffer.segments
        }
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._tied = {key: known for key, known in names.items() if len(known) > 1}
        """All names of parameters that have several, the first one first."""

    def begin(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Before `module` says its state: raise where copies of all of it would not fit in memory, or be of no step."""
        self._refuse_unless_open()
        for block in [*self._scheduler.blocks, self._scheduler.root]:
            if block.updated_since_step:
                raise UsageError(
                    f"state_dict: block {block.name} has been updated during backward, others have not: call it "
                    "between two steps, after optimizer.step()"
                )
        if keep_vars:
            return
        held = {id(p): p.numel() * p.dtype.itemsize for p in module.parameters() if id(p) in self._places}
        needed_nbytes = sum(held.values())
        available_nbytes = host_available_nbytes() if needed_nbytes else 0
        if needed_nbytes > available_nbytes:
            raise BudgetError(
                f"state_dict of {type(module).__name__} takes {needed_nbytes / 1e9:.2f} GB of memory, and "
                f"{available_nbytes / 1e9:.2f} GB are available: write the model with offload.export(model, DIR), its "
                "training state with offload.save(model, DIR), or go through model.offload.iter_blocks(), which take "
                "one block of memory"
            )

    def fill(self, module: nn.Module, destination: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Put copies in host memory in place of the parameters that `module` itself holds."""
        for name, parameter in module._parameters.items():
            key = prefix + name
            if parameter is None or id(parameter) not in self._places or key not in destination:
                continue
            if destination[key] is parameter:
                self._keep(key, parameter)
            else:
                destination[key] = self._shared(key, parameter, destination, self._copy(parameter))

    def begin_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
        """Before anything of `state` is put into `module`: raise where that would be a parameter."""
        self._refuse_unless_open()
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if prefix + name in state and id(parameter) in self._places:
                raise UsageError(
                    f"load_state_dict: {prefix + name} and its fp32 master live in the tiers, where it would not be "
                    "changed; nothing has been. Load into the model before offload.wrap, or go on from a checkpoint of "
                    "offload.save with offload.resume; offload.load reads a Hugging Face directory"
                )

    def _keep(self, key: str, parameter: nn.Parameter) -> None:
        """With `keep_vars=True`: only what stays in memory can be given itself."""
        block, _, _ = self._places[id(parameter)]
        if not block.is_root:
            raise UsageError(
                f"state_dict(keep_vars=True): {key} comes and goes with its block; leave keep_vars out for copies"
            )
        self._scheduler.hold_root()

    def _copy(self, parameter: nn.Parameter) -> torch.Tensor:
        block, buffer, segment = self._places[id(parameter)]
        with self._scheduler.reading(block):
            return segment.view(block.plane(buffer)).to("cpu", copy=True)

    def _shared(
        self, key: str, parameter: nn.Parameter, destination: dict[str, Any], copied: torch.Tensor
    ) -> torch.Tensor:
        """The tensor that another name of a tied parameter has been given already; otherwise `copied`."""
        names = self._tied.get(id(parameter), [])
        own = max((n for n in names if f".{key}".endswith(f".{n}")), key=len, default=None)
        if own is not None:
            outer = key[: len(key) - len(own)]
            for name in names[: names.index(own)]:
                given = destination.get(outer + name)
                if (
                    isinstance(given, torch.Tensor)
                    and given.device == copied.device
                    and torch.equal(given, copied)
                ):
                    return given
        return copied

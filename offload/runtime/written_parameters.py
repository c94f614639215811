"""What a loop does to parameters behind the engine's back is kept where it can be, and refused by name where not.

See [Note: guarded parameters] in model/guarded.py for how a write is noticed. One is kept where what is computed with
is the fp32 master itself, in memory of its own that no other copy is made of: then training goes on from it as torch's
would. Elsewhere the next use of the block, the step, or whoever reads parameters says that it was in vain.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from offload.errors import UsageError
from offload.model import guarded
from offload.stores.block_store import BlockRecord


class WrittenParameters:
    """Watches the parameters of `records`, which the modules of `model` hold. `shares_host`: the device computes with
    what updates change. `by_kernels`: updates need nothing beside planes and records."""

    def __init__(
        self, model: nn.Module, records: list[BlockRecord], *, shares_host: bool, by_kernels: bool
    ) -> None:
        self._model, self._records = weakref.ref(model), records
        for record in records:
            trained = {b.dtype for b in record.layout.buffers if b.trainable}
            has_one_copy = record.param_offset < 0 and record.sides is None
            in_place = by_kernels and (shares_host or record.on_device)
            record.keeps_writes = in_place and has_one_copy and trained <= {torch.float32}
            record.watch_writes()
        ours = {id(s.parameter): s.parameter for r in records for b in r.layout.buffers for s in b.segments}
        self._places = [
            (module._parameters, key, parameter, f"{path}.{key}" if path else key)
            for path, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in ours
        ]

    def refuse_of(self, record: BlockRecord) -> None:
        """Raise UsageError where something was written to a parameter of the block, and is lost."""
        record.note_writes()
        if record.written:
            raise UsageError(
                f"{record.written} was written to in place (by the loop, or by a forward that renormalises it), but "
                "what it held there is a copy that moves between the tiers: what was written is lost, and this run is "
                f"not to be trained further. {guarded.REMEDY}"
            )

    def refuse(self) -> None:
        """The same for every block; and for a parameter that is not in its module any more."""
        for record in self._records:
            self.refuse_of(record)
        for held, key, parameter, name in self._places:
            if held.get(key) is not parameter:
                raise UsageError(_moved(name))

    def refuse_moved(self) -> None:
        """Raise UsageError where the model has another parameter, or none, under a name that is about to be written."""
        model = self._model()
        if model is None:
            return
        present = dict(model.named_parameters(remove_duplicate=False))
        for _, _, parameter, name in self._places:
            if present.get(name) is not parameter:
                raise UsageError(_moved(name))


def _moved(name: str) -> str:
    return (
        f"{name} was taken out of the model, or another one put in its place, after offload.wrap: this run trains, "
        "saves and exports the one that it was given. Change the model before offload.wrap"
    )


def let_go(parameters: Iterable[torch.Tensor]) -> None:
    """They are the engine's no more."""
    guarded.release(parameters)

"""The update of a piece of a chunk in Python: from the pipeline's memory to fp32 tensors and back.

The pipeline's threads call in with the GIL (`csrc/bindings_optim.cpp`); what is raised here fails the block's update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from offload.errors import UsageError
from offload.model.flat import FlatBuffer
from offload.runtime.whole_gradients import HeldGradients, StoredGradients, WholeGradients, tensor_at
from offload.tiers.storage import Store
from offload.transfer.io_engine import Hyper, canonicalize_nan, merge_master, split_master


@dataclass(frozen=True)
class PieceUpdate:
    """Elements `offset` and on of a parameter. `param` (the master), `grad` (scaled) and the planes of `state` are fp32
    and of one length; `param` and `state` are changed in place. `whole_grad`: all gradients of the parameter in their
    own dtype and not scaled, for a rule that needs them."""

    hyper: CallbackHyper
    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    offset: int
    whole_grads: WholeGradients | None


class PieceUpdater(Protocol):
    """An optimizer that updates pieces of parameters."""

    def update_piece(self, piece: PieceUpdate) -> None: ...


class CallbackHyper(Hyper):
    """What `updater` is given with a piece of `parameter`; `group` has the values of when the step was decided."""

    def __init__(
        self,
        updater: PieceUpdater,
        parameter: torch.nn.Parameter,
        group: dict[str, Any],
        *,
        step: int,
        grad_scale: float,
        start: int,
    ) -> None:
        super().__init__(float(group.get("lr", 0.0)), step=step, grad_scale=grad_scale, noise_origin=start)
        self.updater = updater
        self.parameter = parameter
        self.group = group
        self.start = start
        """Element of the flat buffer where the parameter begins."""


class ChunkUpdate:
    """What a job calls."""

    def __init__(
        self,
        buffer: FlatBuffer,
        segments: Sequence[tuple[int, int, Hyper]],
        grad_dtype: str,
        whole_grads: WholeGradients,
    ) -> None:
        self._split = buffer.codec == "split_bf16"
        self._names = [plane.name for plane in buffer.rule.planes]
        self._whole_grads = whole_grads if buffer.rule.whole_gradients else None
        self._hypers = [hyper for _, _, hyper in segments]
        self._grad_dtype: torch.dtype = getattr(torch, grad_dtype)

    @torch.no_grad()
    def __call__(
        self, segment: int, element: int, n: int, param: int, lo: int, grad: int, state: list[int]
    ) -> None:
        """Update `n` elements from `element` of the flat buffer on; addresses are of the first of them."""
        hyper = self._hypers[segment]
        if not isinstance(hyper, CallbackHyper):
            raise UsageError("an update in Python needs a CallbackHyper; please report this")
        if self._split:
            master = torch.empty(n, dtype=torch.float32)
            merge_master(param, lo, master.data_ptr(), n)
        else:
            master = tensor_at(param, n, torch.float32)
        grads = tensor_at(grad, n, self._grad_dtype).to(torch.float32, copy=True)
        if hyper.grad_scale != 1.0:
            grads.mul_(hyper.grad_scale)
        planes = {
            name: tensor_at(address, n, torch.float32)
            for name, address in zip(self._names, state, strict=True)
        }
        offset = element - hyper.start
        hyper.updater.update_piece(PieceUpdate(hyper, master, grads, planes, offset, self._whole_grads))
        for tensor in (master, *planes.values()):
            canonicalize_nan(tensor.data_ptr(), n)
        if self._split:
            split_master(master.data_ptr(), param, lo, n)


def chunk_update(
    buffer: FlatBuffer,
    segments: Sequence[tuple[int, int, Hyper]],
    grad_dtype: str,
    grad_address: int,
    grad_offset: int,
    store: Store | None,
) -> ChunkUpdate | None:
    """What a job on `buffer` calls; None where a kernel makes its update. The buffer's gradients are in host memory at
    `grad_address` or, where `grad_offset` is not negative, in the store there."""
    if not buffer.rule.is_callback:
        return None
    whole: WholeGradients = HeldGradients(grad_address, getattr(torch, grad_dtype))
    if grad_offset >= 0 and store is not None:
        whole = StoredGradients(store, grad_offset)
    return ChunkUpdate(buffer, segments, grad_dtype, whole)


class ElementwiseUpdater:
    """Runs an `offload.ElementwiseOptimizer`."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def update_piece(self, piece: PieceUpdate) -> None:
        """Its own update of this piece."""
        hyper = piece.hyper
        self._source.apply(piece.param, piece.grad, piece.state, hyper.step, hyper.group)

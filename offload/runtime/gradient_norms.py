"""Norms of gradients: what a step is clipped by, and judged by where it can be taken back."""

from __future__ import annotations

import torch
from torch import nn

from offload.runtime.gradients import Gradients
from offload.runtime.optimizer import OffloadOptimizer
from offload.stores.block_store import BlockRecord

DOT_ELEMENTS = 1 << 30
"""Of one torch.dot: cuBLAS counts elements in 32 bits."""


def _places(model: nn.Module, blocks: list[BlockRecord]) -> dict[int, int]:
    """By id(), the order in which torch adds norms: that of the model's parameters, those of one dtype together.

    It is the same however the model is cut, and whether or not it is streamed.
    """
    dtype_of = {
        id(segment.parameter): buffer.dtype
        for block in blocks
        for buffer in block.layout.buffers
        for segment in buffer.segments
        if buffer.trainable
    }
    found = [id(parameter) for parameter in model.parameters() if id(parameter) in dtype_of]
    dtypes = list(dict.fromkeys(dtype_of[one] for one in found))
    found.sort(key=lambda one: dtypes.index(dtype_of[one]))
    return {one: place for place, one in enumerate(found)}


class GradientNorms:
    """`limit` is `max_grad_norm`; `judged`: a step whose norm is not finite is discarded, so it is needed anyway.

    Norms are taken as a block's backward ends. Those of gradients that came in a `no_sync()` are taken when the step
    asks for them, where no later backward went through the block: it was left out of that, or there was none.
    """

    def __init__(
        self,
        model: nn.Module,
        root: BlockRecord,
        blocks: list[BlockRecord],
        limit: float | None,
        judged: bool,
        gradients: Gradients,
    ) -> None:
        self._root, self._blocks = root, blocks
        self._gradients = gradients
        self._limit, self._judged = limit, judged
        self._place = _places(model, [root, *blocks])
        """By id() of the parameter: where its norm stands in the sum."""

    def note(self, block: BlockRecord, only: set[int] | None = None, *, more: bool = False) -> None:
        """Keep the norms of the block's gradients, which are complete, where somebody will ask for them.

        `only` those of the parameters with these id(); `more`: beside what was noted before.
        """
        if self._limit is not None or self._judged:
            block.grad_norms = (block.grad_norms if more else []) + self._of_block(block, only)

    def ended(self, block: BlockRecord, *, complete: bool) -> None:
        """The block's backward has: its gradients are `complete`, or another backward may add to them."""
        if complete:
            self.note(block)
        else:
            block.grad_norms = []

    def _of_waiting(self, block: BlockRecord) -> list[tuple[int, torch.Tensor]]:
        """Norms of the block's gradients that wait."""
        if not block.grad_norms:
            with self._gradients.looked_at(block):
                block.grad_norms = self._of_block(block)
        return block.grad_norms

    def _of_block(self, block: BlockRecord, only: set[int] | None = None) -> list[tuple[int, torch.Tensor]]:
        """(place, norm) of the block's gradients: where it clips one each, as torch takes them; elsewhere of pieces,
        the quickest way."""
        if block.grad_buffer is None:
            return []
        grads = [
            (self._place[id(segment.parameter)], block.grad_buffer.part(buffer, segment))
            for buffer in block.layout.buffers
            for segment in buffer.segments
            if id(segment.parameter) in (block.touched if only is None else block.touched & only)
        ]
        if self._limit is None and block.grad_buffer.plane.dtype == torch.float32:
            pieces = [(at, piece) for at, grad in grads for piece in grad.view(-1).split(DOT_ELEMENTS)]
            return [(at, torch.dot(piece, piece).sqrt()) for at, piece in pieces]
        return [(at, torch.linalg.vector_norm(grad, dtype=torch.float32)) for at, grad in grads]

    def total(self, optimizer: OffloadOptimizer) -> torch.Tensor | None:
        """Global norm of the step's gradients, divided by the loss scale; None where nobody asked or none came."""
        if self._limit is None and not self._judged:
            return None
        norms = self._of_block(self._root) if self._root.touched else []
        for block in [self._root, *self._blocks]:
            if block.updated_since_step:
                norms += block.grad_norms
            elif block.touched and not (block.is_root or block.pending_update):
                norms += self._of_waiting(block)
        if not norms:
            return None
        in_order = [norm for _, norm in sorted(norms, key=lambda placed: placed[0])]
        return torch.linalg.vector_norm(torch.stack(in_order)) / optimizer.loss_scale

    def scale(self, optimizer: OffloadOptimizer) -> float:
        """Factor that undoes the loss scale and brings the global norm to the limit, as
        torch.nn.utils.clip_grad_norm_ computes it. Leaves the norm in `optimizer.grad_norm`."""
        total = self.total(optimizer)
        if total is not None or self._judged:
            optimizer.grad_norm = total
        if total is None or self._limit is None:
            return 1.0 / optimizer.loss_scale
        return min(1.0, float(self._limit / (total + 1e-6))) / optimizer.loss_scale

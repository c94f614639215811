"""A model as the planner sees it: parameters, FLOPs and activation bytes, block by block. No torch.

All per-sample quantities are for one sequence of `tokens_per_sample` tokens; they grow linearly with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that backward needs: its bytes a sample, and the forward FLOPs a sample that recompute it alone,
    given the saved or recomputed tensors before it. `source` is the operation that makes it (`linear`, ...)."""

    name: str
    source: str
    nbytes_per_sample: int
    recompute_flops_per_sample: float


@dataclass(frozen=True)
class BlockWork:
    """One streamed block. FLOPs count a multiply-add as two."""

    name: str
    trainable_numel: int
    frozen_numel: int
    forward_flops_per_sample: dict[str, float]
    """By kind of operation; their sum is the block's forward."""
    input_nbytes_per_sample: int
    """The block's input (its activation checkpoint)."""
    saved: tuple[SavedTensor, ...]
    """In the order in which forward makes them."""
    saved_fixed_nbytes: int = 0
    """What backward needs besides, whatever the batch (a position bias, a mask)."""

    @property
    def flops_per_sample(self) -> float:
        """Forward FLOPs of one sample."""
        return sum(self.forward_flops_per_sample.values())


@dataclass(frozen=True)
class Workload:
    """A whole model at one sequence length. The root is everything outside the blocks; head and loss are in it."""

    name: str
    tokens_per_sample: int
    param_nbytes: int
    """Bytes of a parameter as it is computed with: 2 for bfloat16, 4 for float32."""
    blocks: tuple[BlockWork, ...]
    root_trainable_numel: int
    root_frozen_numel: int
    root_flops_per_sample: float
    """Embedding, final norm, head and loss: forward."""
    logits_nbytes_per_sample: int
    root_saved: tuple[SavedTensor, ...] = ()
    """What backward needs of embedding, final norm, head and loss as the model computes them (logits not chunked)."""
    root_forward_flops_per_sample: dict[str, float] = field(default_factory=dict)
    """`root_flops_per_sample` by kind of operation."""

    @property
    def numel(self) -> int:
        """All parameters, each once."""
        blocks = sum(b.trainable_numel + b.frozen_numel for b in self.blocks)
        return blocks + self.root_trainable_numel + self.root_frozen_numel

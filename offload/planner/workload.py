"""A model as the planner sees it: parameters, FLOPs and activation bytes, block by block. No torch.

All per-sample quantities are for one sequence of `tokens_per_sample` tokens; they grow linearly with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from offload.update_rules import ADAMW, UpdateRule


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
    working: tuple[tuple[int, int], ...] = ()
    """(fixed bytes, bytes a sample) alive at the operations of recomputation and backward that may be the peak, without
    parameters and the block's input; saved tensors are in them. Empty: not traced."""

    padding_numel: int = 0
    """Elements without a parameter between the trainable ones, where they lie end to end in planes of whole pages."""

    @property
    def stored_numel(self) -> int:
        """Trainable parameters with their padding: what has state, gradients and a place in a slot."""
        return self.trainable_numel + self.padding_numel

    def working_nbytes(self, samples: float) -> int | None:
        """Most bytes alive at once while a micro-batch of `samples` goes backward; None where it was not traced."""
        return peak_of(self.working, samples)

    def nbytes_by_tensor(self) -> dict[str, int]:
        """Bytes a sample of everything that backward needs, the block's input (`input`) included."""
        return {"input": self.input_nbytes_per_sample} | {t.name: t.nbytes_per_sample for t in self.saved}

    @property
    def flops_per_sample(self) -> float:
        """Forward FLOPs of one sample."""
        return sum(self.forward_flops_per_sample.values())


@dataclass(frozen=True)
class Largest:
    """Of all blocks the largest of each figure, which memory has to be there for. 0 without blocks."""

    stored_numel: int
    slot_numel: int
    """Trainable (with padding) and frozen parameters."""
    input_nbytes_per_sample: int
    tensor_nbytes_per_sample: int
    """Of one saved tensor."""
    micro_nbytes_per_sample: int
    """All tensors of a block that backward needs, input included."""
    saved_fixed_nbytes: int
    working: tuple[tuple[int, int], ...]
    """The lines of all blocks' `working`; empty where a block was not traced."""

    @classmethod
    def of(cls, blocks: tuple[BlockWork, ...]) -> Largest:
        """What is largest among these."""
        traced = all(b.working for b in blocks)
        return cls(
            stored_numel=max((b.stored_numel for b in blocks), default=0),
            slot_numel=max((b.stored_numel + b.frozen_numel for b in blocks), default=0),
            input_nbytes_per_sample=max((b.input_nbytes_per_sample for b in blocks), default=0),
            tensor_nbytes_per_sample=max((t.nbytes_per_sample for b in blocks for t in b.saved), default=0),
            micro_nbytes_per_sample=max(
                (b.input_nbytes_per_sample + sum(t.nbytes_per_sample for t in b.saved) for b in blocks),
                default=0,
            ),
            saved_fixed_nbytes=max((b.saved_fixed_nbytes for b in blocks), default=0),
            working=tuple(sorted({line for b in blocks for line in b.working})) if traced else (),
        )


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
    root_working: tuple[tuple[int, int], ...] = ()
    """As `BlockWork.working`, for the root's forward and backward with the loss."""
    root_padding_numel: int = 0
    """As `BlockWork.padding_numel`."""
    root_held: tuple[tuple[int, int], ...] = ()
    """Of these bytes, what is alive while backward goes through the blocks."""

    one_dtype: bool = True
    """Whether all trainable parameters of the blocks have `param_nbytes`."""

    rule: UpdateRule = ADAMW
    """How parameters are updated, and with what state."""

    trainable_shapes: tuple[tuple[int, ...], ...] = ()
    """Of all trainable parameters: what a rule may keep of whole ones (`statistics_nbytes`) depends on them."""

    whole_logits: bool = False
    """The model computes head and loss by its own code; otherwise in chunks of tokens (model/causal_lm_loss.py)."""

    on_device_numel: int = 0
    on_device_nbytes: int = 0
    """What `states_on_device.streamed_workload` has taken out of it: parameters whose optimizer state stays in device
    memory, and what that takes there."""

    root_early_numel: int = 0
    """Root parameters whose gradients are complete before backward comes to the blocks: those of an untied head."""

    stays_nbytes: int = 0
    """Buffers and scales of quantized weights: in device memory all the time, where that is memory of its own. A run
    counts them by itself (`Budgets.device_own_nbytes`)."""

    @property
    def root_stored_numel(self) -> int:
        """As `BlockWork.stored_numel`."""
        return self.root_trainable_numel + self.root_padding_numel

    @cached_property
    def largest(self) -> Largest:
        """Of the blocks. A search asks for it with every shape of working memory."""
        return Largest.of(self.blocks)

    @cached_property
    def head_numel(self) -> int:
        """The output head's matrix, the one with the most rows; 0 where shapes are not known."""
        rows, columns = max((shape for shape in self.trainable_shapes if len(shape) == 2), default=(0, 0))
        return rows * columns

    @property
    def early_numel(self) -> int:
        """Root parameters that are updated before the blocks' backward ends; none where a rule needs all gradients of
        the root at once."""
        return 0 if self.rule.whole_gradients else self.root_early_numel

    @property
    def statistics_nbytes(self) -> int:
        """In a commit record or a manifest, of what the rule keeps of whole parameters beside the planes."""
        return sum(self.rule.encoded_statistics_nbytes(shape) for shape in self.trainable_shapes)

    @property
    def stored_grad_reads(self) -> int:
        """How often gradients that wait on storage are read: once by the update, and once for each of two sums that a
        rule may need of all of them."""
        return 3 if self.rule.whole_gradients else 1

    @property
    def numel(self) -> int:
        """All parameters, each once."""
        blocks = sum(b.trainable_numel + b.frozen_numel for b in self.blocks)
        return blocks + self.root_trainable_numel + self.root_frozen_numel


def peak_of(lines: tuple[tuple[int, int], ...], samples: float) -> int | None:
    """The largest of `fixed + samples * grown` over `lines`; None without any."""
    return int(max(fixed + samples * grown for fixed, grown in lines)) if lines else None

"""Cross-entropy of Hugging Face causal language models without ever holding the logits of a whole batch.

[Note: lazy logits] With labels, the head of the model returns `LazyLogits`: the shape of the logits, and what
is needed to compute them. The loss function recognises them and works through the tokens chunk by chunk,
computing the loss and its gradients together, so nothing is computed twice. Whatever else looks at the logits
first (a softcap, a metric) gets the real ones, computed the usual way, and everything stays exact: only the
memory is then the usual one.

[Note: rows of a chunk] With T rows a chunk, V words and width H, the product that a chunk adds to the fp32 sum of the
head's gradient takes 2TVH FLOPs, and reading and writing that sum moves 8VH bytes. At R FLOP/s and B bytes/s the
product takes longer than the traffic it hides when 2TVH / R >= 8VH / B, or T >= 4R / B; even if nothing were hidden,
the traffic would take a third of the time of the chunk's three products. R / B is 213 for bf16 on an H100 (713 TFLOP/s
and 3.35 TB/s) and less on the other cards whose profiles are here, so 1024 rows do. Small widths get fewer, so that two
fp32 buffers of logits take no more than that sum. On a processor, where products are slower, rows fill 64 MiB.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload.errors import ConfigError, UsageError
from offload.model.fp32_sums import add_outer

CHUNK_LOGITS_NBYTES = 64 * 2**20
"""fp32 logits of one chunk on a processor, and at least so many elsewhere, when `chunk_tokens` is not given."""
CHUNK_LOGITS_NBYTES_MAX = 512 * 2**20
"""fp32 logits of one chunk on a device of its own."""
ROWS_THAT_HIDE_THE_SUM = 1024
"""See [Note: rows of a chunk]."""


def chunk_rows(vocabulary: int, width: int, *, own_memory: bool) -> int:
    """Rows of a chunk when `chunk_tokens` is not given: of a head of `width`, or 0 where it gets no gradient, on a
    device with memory of its own or on a processor. See [Note: rows of a chunk].

    Beside the sum of the head's gradient two fp32 buffers of so many logits exist at once, and one in the dtype that
    the head computes in.
    """
    row_nbytes = 4 * vocabulary
    least = max(1, CHUNK_LOGITS_NBYTES // row_nbytes)
    if not own_memory:
        return least
    return max(least, min(ROWS_THAT_HIDE_THE_SUM, width // 2, CHUNK_LOGITS_NBYTES_MAX // row_nbytes))


class LazyLogits(torch.Tensor):
    """Logits (..., vocabulary) that are computed when somebody looks. See [Note: lazy logits]."""

    hidden: torch.Tensor
    head: nn.Linear
    _compute: Callable[[torch.Tensor], torch.Tensor]
    _value: torch.Tensor | None
    _stale: bool

    @staticmethod
    def make(
        hidden: torch.Tensor,
        head: nn.Linear,
        compute: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
    ) -> LazyLogits:
        """Logits of `hidden` (..., width) through `head`; `compute` is its ordinary forward, in `dtype`."""
        requires_grad = hidden.requires_grad or head.weight.requires_grad
        lazy: LazyLogits = torch.Tensor._make_wrapper_subclass(
            LazyLogits,
            (*hidden.shape[:-1], head.out_features),
            dtype=dtype,
            device=hidden.device,
            requires_grad=requires_grad,
        )
        lazy.hidden, lazy.head, lazy._compute = hidden, head, compute
        lazy._value, lazy._stale = None, False
        return lazy

    @property
    def is_materialised(self) -> bool:
        """Whether the logits exist."""
        return self._value is not None

    def mark_stale(self) -> None:
        """Backward has begun, so the head's parameters may change: the logits can no longer be computed."""
        self._stale = True

    def materialise(self) -> torch.Tensor:
        """The real logits, differentiable. Raises UsageError once backward has used them up."""
        if self._value is None:
            if self._stale:
                raise UsageError(
                    "the logits of this batch were never computed as a whole, and backward may have changed "
                    "the parameters since: read outputs.logits before loss.backward(), or skip chunk_loss"
                )
            self._value = self._compute(self.hidden)
        return self._value

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]  # torch names it None
        if self._value is not None:
            return repr(self._value)
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_real(args), **_real(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub declares the disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_real(args), **_real(kwargs or {}))


_METADATA: frozenset[Any] = frozenset(
    [
        getattr(torch.Tensor, n).__get__
        for n in ("shape", "dtype", "device", "requires_grad", "layout", "ndim")
    ]
    + [getattr(torch.Tensor, n) for n in ("size", "dim", "numel", "__len__", "is_floating_point")]
)
"""What may be asked of lazy logits without computing them."""


def _real(tree: Any) -> Any:
    return pytree.tree_map_only(LazyLogits, lambda lazy: lazy.materialise(), tree)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and, already in forward, its gradients for hidden states and head, chunk by chunk of tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        denominator: torch.Tensor,
        ignore_index: int,
        chunk_tokens: int,
        on_backward: Callable[[], None],
    ) -> torch.Tensor:
        device_type = hidden.device.type
        compute_dtype = _linear_dtype(weight)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        flat = hidden.reshape(-1, hidden.shape[-1])
        valid = labels != ignore_index
        targets = labels.where(valid, 0)[:, None]
        # Ignored tokens get exactly zero, also when all are ignored and the loss itself is NaN, as in torch.
        scale = torch.where(valid, denominator.reciprocal(), 0.0)[:, None]
        nll = torch.empty(flat.shape[0], dtype=torch.float32, device=flat.device)
        grad_hidden = torch.empty_like(flat) if needs_hidden else None
        zeros = partial(torch.zeros, dtype=torch.float32, device=weight.device)
        grad_weight = zeros(weight.shape) if needs_weight else None
        grad_bias = zeros(weight.shape[0]) if needs_bias else None
        with torch.autocast(device_type, enabled=False):
            operand = weight.to(compute_dtype)
            offset = None if bias is None else bias.to(compute_dtype)
            for start in range(0, flat.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                chunk = flat[rows].to(compute_dtype)
                grad = torch.log_softmax(nn.functional.linear(chunk, operand, offset).float(), dim=-1)
                nll[rows] = -grad.gather(1, targets[rows])[:, 0]
                grad.exp_()  # softmax - one-hot, scaled: the gradient of the logits
                grad.scatter_add_(1, targets[rows], torch.full_like(grad[:, :1], -1.0))
                grad.mul_(scale[rows])
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                if _has_own_memory(grad.device):
                    grad = grad.to(compute_dtype)  # once, for both products
                if grad_weight is not None:
                    add_outer(grad_weight, grad, chunk)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad.to(compute_dtype) @ operand
                del grad  # or it would exist beside two buffers of the next chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.shape = hidden.shape
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.on_backward = on_backward
        return nll.where(valid, 0.0).sum() / denominator

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.on_backward()
        grads: list[torch.Tensor | None] = []
        for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if saved is None:
                grads.append(None)
            else:  # one rounding, no fp32 copy
                grads.append(torch.mul(saved, grad_output, out=torch.empty_like(saved, dtype=dtype)))
        if grads[0] is not None:
            grads[0] = grads[0].view(ctx.shape)
        return (*grads, None, None, None, None, None)


def _linear_dtype(weight: torch.Tensor) -> torch.dtype:
    """What `linear` computes in here: autocast's dtype when it is on, the weight's own otherwise."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def _has_own_memory(device: torch.device) -> bool:
    return device.type != "cpu"


def _as_scalar(value: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    """As fp32 on the device, which a number in host memory reaches by a kernel: to copy it would be to wait."""
    if isinstance(value, torch.Tensor) and (value.dim() or value.device.type == device.type):
        return value.to(device, torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=device)


class ChunkedLoss:
    """The change `chunk_loss` has made to a model; `remove()` undoes it."""

    def __init__(self, model: nn.Module, head: nn.Linear, chunk_tokens: int | None) -> None:
        self.model = model
        self.head = head
        self.chunk_tokens = chunk_tokens
        self._armed = False
        self._signature = inspect.signature(model.forward)
        self._stock_loss: Callable[..., torch.Tensor] = model.loss_function  # type: ignore[assignment]  # HF property
        self._own_loss = model.__dict__.get("_loss_function")
        self._head_forward = head.forward
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]
        head.forward = self._lazy_head  # type: ignore[method-assign, assignment]  # the point of this class
        model.loss_function = self._loss  # type: ignore[assignment]

    def remove(self) -> None:
        """Give the model its own head and loss back."""
        for handle in self._handles:
            handle.remove()
        self.head.__dict__.pop("forward", None)
        self.model.__dict__.pop("_loss_function", None)
        if self._own_loss is not None:
            self.model.loss_function = self._own_loss

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if labels is None and args:
            with contextlib.suppress(TypeError):  # forward itself will complain about such a call
                labels = self._signature.bind_partial(*args, **kwargs).arguments.get("labels")
        traced = self.head.weight.is_meta  # without data: the workload is that of the model's own head
        self._armed = labels is not None and torch.is_grad_enabled() and not traced

    def _after_forward(self, *_: Any) -> None:
        self._armed = False

    def _lazy_head(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self._armed:
            return self._head_forward(hidden)
        return LazyLogits.make(hidden, self.head, self._head_forward, _linear_dtype(self.head.weight))

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        lazy = logits if isinstance(logits, LazyLogits) and not logits.is_materialised else None
        if lazy is not None and shift_labels is None:
            wanted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1)
        else:
            wanted = labels.reshape(-1) if shift_labels is None else shift_labels.reshape(-1)
        if lazy is None or vocab_size != logits.shape[-1] or wanted.numel() * vocab_size != logits.numel():
            return self._stock_loss(
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        hidden = lazy.hidden
        wanted = wanted.to(hidden.device)
        denominator = (wanted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return _ChunkedCrossEntropy.apply(
            hidden,
            self.head.weight,
            self.head.bias,
            wanted,
            _as_scalar(denominator, hidden.device),
            ignore_index,
            self.chunk_tokens or self._chunk_rows(hidden.device),
            lazy.mark_stale,
        )

    def _chunk_rows(self, device: torch.device) -> int:
        width = self.head.in_features if self.head.weight.requires_grad else 0
        return chunk_rows(self.head.out_features, width, own_memory=_has_own_memory(device))


def why_not_chunked(model: nn.Module) -> str | None:
    """Why `chunk_loss` cannot work on `model`; None when it can."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if type(head) is not nn.Linear:
        return f"the output head of {type(model).__name__} is {type(head).__name__}, not torch.nn.Linear"
    if "forward" in head.__dict__:
        return f"the output head of {type(model).__name__} has been changed by something else"
    loss = getattr(model, "loss_function", None)
    if getattr(loss, "__name__", "") != "ForCausalLMLoss":
        return f"the loss of {type(model).__name__} is {getattr(loss, '__name__', loss)}, not ForCausalLMLoss"
    return None


def has_chunked_loss(model: nn.Module) -> bool:
    """Whether `chunk_loss` has changed the model."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return isinstance(getattr(getattr(head, "forward", None), "__self__", None), ChunkedLoss)


def chunk_loss(model: nn.Module, chunk_tokens: int | None = None) -> ChunkedLoss:
    """Let a Hugging Face causal language model compute its training loss `chunk_tokens` tokens at a time.

    The largest logits that exist are (chunk_tokens, vocabulary), by default as `chunk_rows` says. The loss equals the
    stock one token by token; the head's gradient is summed in fp32 over the chunks and rounded once. Calls without
    labels or without gradients are untouched. Raises ConfigError for a model whose head or loss is not the usual one.
    """
    reason = why_not_chunked(model)
    if reason is not None:
        raise ConfigError(f"the loss cannot be computed in chunks: {reason}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens={chunk_tokens} must be at least 1")
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]  # checked above
    return ChunkedLoss(model, head, chunk_tokens)

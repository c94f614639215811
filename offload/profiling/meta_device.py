"""Running a forward pass without data, on the meta device, where data would decide what happens.

[Note: routed tokens] A mixture of experts computes on what its router chose, which no shape tells. The number of
(token, expert) pairs is known, though: tokens times choices, however they fall. So the indices a router picks (`topk`,
`argmax`, `sort`) are made real here, spread evenly over the experts, and integer work on them runs on real numbers: the
loop over experts sees the row counts of a balanced router. Products are linear in their rows, so that FLOPs and saved
bytes summed over experts are those of any other routing.

Integers that need no data (token ids, positions, masks) are real as well, up to a limit, because models look at them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from offload.errors import ConfigError

aten = torch.ops.aten
INTEGERS_NUMEL_MAX = 1 << 24
"""Integer tensors above this stay without data."""

_CHOICES = {aten.topk, aten.argmax, aten.argmin, aten.sort, aten.argsort, aten.max, aten.min}


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _to_meta(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t if t.is_meta else t.to("meta"), tree)


def _spread(indices: torch.Tensor, n_choices: int) -> torch.Tensor:
    """Real indices of that shape: 0, 1, 2, ... modulo `n_choices`, so that every choice is as frequent."""
    return (
        torch.arange(indices.numel(), dtype=indices.dtype).remainder_(max(1, n_choices)).view(indices.shape)
    )


def _make_choices_real(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    scores = args[0]
    dims = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, int) and not isinstance(a, bool)]
    if operator._overloadpacket is aten.topk:
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    else:
        dim = dims[0] if dims and scores.dim() else -1
    n_choices = scores.shape[dim] if scores.dim() else 1
    return pytree.tree_map_only(
        torch.Tensor,
        lambda t: _spread(t, n_choices) if t.is_meta and t.dtype == torch.int64 else t,
        result,
    )


def _makes_integers(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the result, made from real numbers alone, is a tensor of integers or truth values of moderate size."""
    made = operator(*_to_meta(args), **_to_meta(kwargs))
    return (
        isinstance(made, torch.Tensor) and not made.is_floating_point() and made.numel() <= INTEGERS_NUMEL_MAX
    )


def _keeps_integers(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    return not tensor.is_floating_point() and dtype in (None, tensor.dtype)


def _run_real(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]
) -> Any:
    try:
        return operator(*args, **kwargs)
    except NotImplementedError:
        if not tensors:
            raise
        return operator(*_to_meta(args), **_to_meta(kwargs))  # no kernel for such integers; shapes will do


def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: on real numbers where all are real, on shapes where any is not. See [Note: routed tokens].

    Raises ConfigError where the shape of the result depends on data that is not there.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if not any(t.is_meta for t in tensors):
        if str(kwargs.get("device")) != "meta":
            return _run_real(operator, args, kwargs, tensors)
        if operator is aten._to_copy.default and _keeps_integers(args[0], kwargs.get("dtype")):
            return args[0].detach()  # they stay where they are
        if _makes_integers(operator, args, kwargs):
            return _run_real(operator, args, {**kwargs, "device": torch.device("cpu")}, tensors)
    if "grouped_mm" in operator.name() and args[0].dim() == 2 and args[1].dim() == 3:
        # torch's own shape rule knows bf16 only
        return _to_meta(args[0]).new_empty(args[0].shape[0], args[1].shape[-1])
    try:
        result = operator(*_to_meta(args), **_to_meta(kwargs))
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise ConfigError(
            f"the model cannot be traced without data: {operator} needs the values of a tensor. Trace a real model "
            "of the same shape on the CPU with offload.profiling.workload.trace_workload"
        ) from error
    if operator._overloadpacket in _CHOICES and _is_meta(args[0]):
        return _make_choices_real(operator, args, kwargs, result)
    return result


_DROPOUTS = (torch.nn.functional.dropout, torch.dropout)


class FusedOperations(TorchFunctionMode):
    """Runs on the meta device what a GPU runs: scaled dot products as one operation, where the meta device alone would
    write the matrix of scores out, and dropout with a mask of one byte an element."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and _is_meta(
            args[0] if args else kwargs["query"]
        ):
            return _fused_attention(*args, **kwargs)
        if func in _DROPOUTS and _is_meta(args[0] if args else kwargs["input"]):
            return _fused_dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the kernels want it to be added
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    is_learned = attn_mask is not None and attn_mask.requires_grad
    if (
        is_learned or value.shape[-1] != query.shape[-1]
    ):  # T5's bias, DeepSeek's values: the kernel that takes them
        bias = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[-2])
        outputs = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal, scale=scale
        )
        return outputs[0]
    outputs = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )
    return outputs[0]

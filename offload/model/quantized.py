"""Frozen base weights in 8 or 4 bits, as `bitsandbytes` loads them: what its modules keep beside the parameter.

Its 8-bit layers compute with a second reference to the weights, which would stay in memory when the parameter's bytes
go to storage; its 4-bit layers may repack the weights on their first use on some CPUs, which a later fetch would undo.
Both are told to compute with the parameter's present bytes. Scales (one per row, or per 64 weights) are neither
parameters nor buffers, and their kernels read them beside the weights: they go to the device and stay in its memory.
Their weights' `.to(device)` makes a new parameter, and peft puts one in place of each for DoRA on a CPU, where nothing
moves; that would keep the bytes of a slot that others write to. They are told to stay the parameter that they are.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.errors import ConfigError


@dataclass(frozen=True)
class Quantized:
    """A weight that is kept in 8 or 4 bits: its shape as a matrix, and how its bytes become that matrix, in fp32."""

    shape: tuple[int, ...]
    dequantize: Callable[[torch.Tensor], torch.Tensor]


def quantized_weights(model: nn.Module) -> dict[str, Quantized]:
    """By parameter name, of layers of `bitsandbytes`; their scales are those of the modules, which stay in memory."""
    functional: Any = sys.modules.get("bitsandbytes.functional")
    found: dict[str, Quantized] = {}
    for name, module in model.named_modules() if functional is not None else ():
        kind: Any = module
        if not is_quantized(module):
            continue
        shape = (kind.out_features, kind.in_features)
        if type(module).__name__ == "Linear8bitLt":
            scales = kind.weight.SCB if kind.state.SCB is None else kind.state.SCB
            found[f"{name}.weight"] = Quantized(shape, functools.partial(_from_8_bits, functional, scales))
        else:
            state = kind.weight.quant_state
            found[f"{name}.weight"] = Quantized(shape, functools.partial(_from_4_bits, functional, state))
    return found


def is_quantized(module: nn.Module) -> bool:
    """Whether its weight is kept in 8 or 4 bits."""
    kind: Any = module
    if not type(module).__module__.startswith("bitsandbytes."):  # peft has classes of the same names
        return False
    if type(module).__name__ == "Linear8bitLt":
        return not kind.state.has_fp16_weights
    return getattr(getattr(kind, "weight", None), "quant_state", None) is not None


def _from_8_bits(functional: Any, scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    dense: torch.Tensor = functional.int8_vectorwise_dequant(weight, scales.to(weight.device))
    return dense.float()


def _from_4_bits(functional: Any, state: Any, weight: torch.Tensor) -> torch.Tensor:
    dense: torch.Tensor = functional.dequantize_4bit(weight, _beside(state, weight.device))
    return dense.float()


def _beside(state: Any, device: torch.device) -> Any:
    """A copy of the scales of a 4-bit weight, on `device`."""
    state = copy.copy(state)
    state.state2 = copy.copy(state.state2)
    state.to(device)
    return state


def _compute_with_parameter(module: Any, _inputs: Any) -> None:
    module.state.CB = module.weight.data


class _Staying:
    """Lets `weight.to` give the weight itself where nothing would change, until `remove`."""

    def __init__(self, weight: Any) -> None:
        self._weight = weight
        weight.to = functools.partial(_to, weakref.ref(weight))

    def remove(self) -> None:
        """Let it be what its class has."""
        self._weight.__dict__.pop("to", None)


def _to(reference: Any, *args: Any, **kwargs: Any) -> Any:
    weight = reference()
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device in (None, weight.device) and dtype in (None, weight.dtype):
        return weight
    return type(weight).to(weight, *args, **kwargs)


def scales_of(model: nn.Module) -> list[tuple[Any, str]]:
    """(holder, attribute) of every tensor that a quantized weight needs beside its bytes; one may be in several."""
    found: list[tuple[Any, str]] = []
    for module in model.modules():
        if not type(module).__module__.startswith("bitsandbytes."):
            continue
        weight: Any = getattr(module, "weight", None)
        of_4_bits = getattr(weight, "quant_state", None)
        attributes = [(weight, "SCB"), (getattr(module, "state", None), "SCB")]
        for holder in (of_4_bits, getattr(of_4_bits, "state2", None)):
            attributes += [(holder, name) for name in ("absmax", "code", "offset")]
        found += [(h, name) for h, name in attributes if isinstance(getattr(h, name, None), torch.Tensor)]
    return found


def prepare_quantized(model: nn.Module) -> list[Any]:
    """Let quantized layers follow their parameters. Returns the handles of the hooks that do it.

    Raises ConfigError for weights that have been repacked already.
    """
    handles: list[Any] = []
    for name, module in model.named_modules():
        kind: Any = module
        if not type(module).__module__.startswith("bitsandbytes."):  # peft has classes of the same names
            continue
        if is_quantized(module):
            handles.append(_Staying(kind.weight))
        if type(module).__name__ == "Linear8bitLt" and not kind.state.has_fp16_weights:
            if kind.weight.CB is not None:
                kind.init_8bit_state()
            kind.state.CB = None
            handles.append(module.register_forward_pre_hook(_compute_with_parameter))
        elif hasattr(module, "support_avx512bf16_for_cpu"):
            state = getattr(kind.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ConfigError(
                    f"{name}: its 4-bit weights have been repacked by running the model in evaluation mode: wrap it "
                    "before it is first used"
                )
            kind.support_avx512bf16_for_cpu = False
    return handles

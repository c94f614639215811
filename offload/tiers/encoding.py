"""Small values of training state (schedulers, random states, data positions) as JSON: no pickle, no loss."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offload.errors import CheckpointError, UsageError

DEPTH_MAX = 64
"""Containers inside one another."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """What `encode` has made already, under a name of its own; it is taken over as it is."""

    content: Any


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype that `dtype_name` gave this name. Raises CheckpointError for one that is not known."""
    if name not in _DTYPES:
        raise CheckpointError(f"dtype {name!r} is not known here; one of {', '.join(_DTYPES)} was expected")
    return _DTYPES[name]


def encode(value: Any, where: str = "state") -> Any:
    """`value` as something `json.dumps` takes. Raises UsageError, naming the place, for what is not plain data.

    Plain data: None, bool, int, float, str, bytes, list, tuple, dict, Counter, numpy arrays and scalars, tensors.
    """
    return _encode(value, where, 0)


def _encode(value: Any, where: str, depth: int) -> Any:
    if isinstance(value, Encoded):
        return value.content
    if depth > DEPTH_MAX:
        raise UsageError(f"{where}: more than {DEPTH_MAX} containers inside one another")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.generic,)):
        return _encode(value.item(), where, depth)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise UsageError(f"{where} is an array of {value.dtype}, which a checkpoint cannot hold")
        raw = np.ascontiguousarray(value).tobytes()
        return {"array": [value.dtype.str, list(value.shape), base64.b64encode(raw).decode()]}
    if isinstance(value, torch.Tensor):
        return {"tensor": _tensor(value, where)}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        pairs = [
            [_encode(key, where, depth + 1), _encode(item, f"{where}[{key!r}]", depth + 1)]
            for key, item in value.items()
        ]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise UsageError(
        f"{where} is a {type(value).__name__}: a checkpoint holds plain data and tensors only: give those, as "
        "vars(args) does of a namespace, list() of a set, and state_dict() of an object with state"
    )


def _tensor(value: torch.Tensor, where: str) -> list[Any]:
    if value.dtype not in _DTYPES.values():
        raise UsageError(f"{where} is a tensor of {value.dtype}, which a checkpoint cannot hold")
    flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return [dtype_name(value.dtype), list(value.shape), base64.b64encode(flat.numpy().tobytes()).decode()]


def decode(value: Any) -> Any:
    """What `encode` was given. Raises CheckpointError for anything it cannot have made."""
    try:
        return _decode(value, 0)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the training state is malformed: {error}") from error


def _decode(value: Any, depth: int) -> Any:
    if depth > DEPTH_MAX:
        raise CheckpointError(f"the training state has more than {DEPTH_MAX} containers inside one another")
    if isinstance(value, list):
        return [_decode(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise CheckpointError("the training state is malformed: an object with more or less than one key")
    ((kind, content),) = value.items()
    if kind not in _DECODERS:
        raise CheckpointError(f"the training state is malformed: unknown kind {kind!r}")
    return _DECODERS[kind](content, depth)


def _decode_float(content: Any, depth: int) -> float:
    if content not in ("nan", "inf", "-inf"):
        raise ValueError(f"{content!r} is not a float")
    return float(content)


def _decode_tensor(content: Any, depth: int) -> torch.Tensor:
    name, shape, text = content
    dtype = dtype_named(name)
    raw = base64.b64decode(text, validate=True)
    numel = math.prod(shape)
    if any(not isinstance(n, int) or n < 0 for n in shape) or numel * dtype.itemsize != len(raw):
        raise ValueError(f"a tensor of shape {shape} with {len(raw)} bytes")
    return torch.frombuffer(bytearray(raw or b"\0" * dtype.itemsize), dtype=dtype)[:numel].reshape(shape)


def _decode_array(content: Any, depth: int) -> np.ndarray[Any, Any]:
    name, shape, text = content
    dtype = np.dtype(str(name))
    if dtype.kind not in "biuf" or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"an array of {name!r} and shape {shape}")
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype).reshape(shape).copy()


def _pairs(content: Any, depth: int) -> dict[Any, Any]:
    return {_decode(key, depth + 1): _decode(item, depth + 1) for key, item in content}


_DECODERS: dict[str, Callable[[Any, int], Any]] = {
    "float": _decode_float,
    "bytes": lambda content, depth: base64.b64decode(content, validate=True),
    "tensor": _decode_tensor,
    "array": _decode_array,
    "tuple": lambda content, depth: tuple(_decode(item, depth + 1) for item in content),
    "dict": _pairs,
    "counter": lambda content, depth: Counter(_pairs(content, depth)),
}

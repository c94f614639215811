"""Values of a DeepSpeed configuration, of the kinds they are meant to have: "false" is false, 4.0 is 4.

Kinds and what is read as which are those of the models in DeepSpeed 0.19.8's runtime/zero/config.py,
runtime/zero/offload_config.py and runtime/precision_config.py, which pydantic reads in its lax mode. What DeepSpeed
takes as it stands there (batch sizes, switches at the top) is read in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from offload.errors import ConfigError

_BOOLEAN: TypeAdapter[bool] = TypeAdapter(bool)
_WHOLE: TypeAdapter[int] = TypeAdapter(int)
_NUMBER: TypeAdapter[float] = TypeAdapter(float)

_BOOLEANS = (
    *("managed_gradient_accumulation", "wall_clock_breakdown", "dataloader_drop_last"),
    *("fp16.enabled", "fp16.consecutive_hysteresis", "bf16.enabled", "bf16.check_grad_overflow"),
    *("torch_autocast.enabled", "activation_checkpointing.cpu_checkpointing"),
    *("zero_optimization.offload_param.pin_memory", "zero_optimization.offload_optimizer.pin_memory"),
)
_WHOLE_NUMBERS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("zero_optimization.stage", "zero_optimization.offload_param.max_in_cpu"),
    *("fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis"),
    *("aio.block_size", "aio.queue_depth"),
)
_NUMBERS = ("gradient_clipping", "fp16.loss_scale", "fp16.min_loss_scale", "steps_per_print")

_MAY_BE_TRUE = ("zero_optimization.stage",)
"""Numbers for which DeepSpeed takes `true` as well."""

_NOT_NEGATIVE = ("fp16.loss_scale", "zero_optimization.offload_param.max_in_cpu")

_HINTS = {
    "fp16.loss_scale": "; 0 is a scale that is searched for",
    "gradient_clipping": "; 0 turns it off",
}


def _refused(path: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f"{path}={json.dumps(value, default=str)}: must be {needed}{_HINTS.get(path, '')}")


def boolean(path: str, value: Any) -> bool:
    """`value` as a switch: true or false, 1 or 0, or one of the words that pydantic takes for them."""
    try:
        return _BOOLEAN.validate_python(value)
    except ValidationError:
        raise _refused(path, value, "true or false") from None


def whole_number(path: str, value: Any) -> int:
    """`value` as a whole number: 4, 4.0 or "4"."""
    needed = "a whole number"
    if isinstance(value, bool) and path not in _MAY_BE_TRUE:
        raise _refused(path, value, needed)
    try:
        return _WHOLE.validate_python(value)
    except ValidationError:
        raise _refused(path, value, needed) from None


def number(path: str, value: Any) -> float:
    """`value` as a number: 1, 0.5 or "0.5"; infinity is one, NaN is not."""
    needed = "a number"
    if isinstance(value, bool):
        raise _refused(path, value, needed)
    try:
        found = value if isinstance(value, int) else _NUMBER.validate_python(value)
    except ValidationError:
        raise _refused(path, value, needed) from None
    if math.isnan(found):
        raise _refused(path, value, needed)
    return found


def settle(config: dict[str, Any]) -> None:
    """Give every value that this library acts on the kind it is meant to have, in place; null and "auto" stay.

    Raises ConfigError for one that is not of its kind.
    """
    for paths, read in ((_BOOLEANS, boolean), (_WHOLE_NUMBERS, whole_number), (_NUMBERS, number)):
        for path in paths:
            *sections, name = path.split(".")
            node: Any = config
            for section in sections:
                node = node.get(section) if isinstance(node, Mapping) else None
            if isinstance(node, dict) and node.get(name) not in (None, "auto"):
                given, node[name] = node[name], read(path, node[name])
                if path in _NOT_NEGATIVE and node[name] < 0:
                    raise _refused(path, given, "at least 0")

"""Full fine-tuning of models far larger than the device, streamed between device, DRAM and NVMe.

[Note: imported when used] torch takes seconds to import, and a command that only prints its help needs none of it. So
public names are imported when they are first asked for (PEP 562), from the modules that `_HOMES` names.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from offload.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    CorruptError,
    OffloadError,
    StoreError,
    UsageError,
)

if TYPE_CHECKING:
    from offload.checkpoint import Resumed, change, export, from_deepspeed, inspect, load, resume, save
    from offload.elementwise import ElementwiseOptimizer
    from offload.lion import Lion
    from offload.runtime.engine import OffloadEngine
    from offload.runtime.optimizer import OffloadOptimizer
    from offload.runtime.wrap import wrap

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "CorruptError",
    "ElementwiseOptimizer",
    "Lion",
    "OffloadEngine",
    "OffloadError",
    "OffloadOptimizer",
    "Resumed",
    "StoreError",
    "UsageError",
    "change",
    "export",
    "from_deepspeed",
    "inspect",
    "load",
    "resume",
    "save",
    "wrap",
]

_CHECKPOINT = ("Resumed", "change", "export", "from_deepspeed", "inspect", "load", "resume", "save")
_HOMES = {
    **dict.fromkeys(_CHECKPOINT, "offload.checkpoint"),
    "ElementwiseOptimizer": "offload.elementwise",
    "Lion": "offload.lion",
    "OffloadEngine": "offload.runtime.engine",
    "OffloadOptimizer": "offload.runtime.optimizer",
    "wrap": "offload.runtime.wrap",
}
"""Where each public name that is not here yet comes from."""

if not TYPE_CHECKING:  # a checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        """A public name, or a module of this package. See [Note: imported when used]."""
        if name in _HOMES:
            found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
            return found
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

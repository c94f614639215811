"""Full fine-tuning of models far larger than the device, streamed between device, DRAM and NVMe."""

from offload.checkpoint import Resumed, change, export, from_deepspeed, inspect, load, resume, save
from offload.elementwise import ElementwiseOptimizer
from offload.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    CorruptError,
    OffloadError,
    StoreError,
    UsageError,
)
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

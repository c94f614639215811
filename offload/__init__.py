"""Full fine-tuning of models far larger than the device, streamed between device, DRAM and NVMe."""

from offload.checkpoint import export, load
from offload.errors import BudgetError, ConfigError, OffloadError, StoreError, UsageError
from offload.runtime.engine import OffloadEngine, wrap
from offload.runtime.optimizer import OffloadOptimizer

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ConfigError",
    "OffloadEngine",
    "OffloadError",
    "OffloadOptimizer",
    "StoreError",
    "UsageError",
    "export",
    "load",
    "wrap",
]

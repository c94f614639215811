"""`deepspeed.runtime`: of it only what scripts import to ask about a parameter, and the engine's class."""

from __future__ import annotations

from typing import Any

from offload.deepspeed import elsewhere
from offload.deepspeed.runtime import engine, zero

__all__ = ["engine", "zero"]


def __getattr__(name: str) -> Any:
    """Say what to do instead of what DeepSpeed's package has and this one has not."""
    raise AttributeError(elsewhere.says(f"runtime.{name}", __all__))

"""`deepspeed.runtime.engine`, for `isinstance` and annotations."""

from offload.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]

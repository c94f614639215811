"""`deepspeed.runtime.zero.partition_parameters`."""

from offload.deepspeed.zero import GatheredParameters, Init, ZeroParamStatus

__all__ = ["GatheredParameters", "Init", "ZeroParamStatus"]

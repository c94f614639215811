"""`deepspeed.ops`: the optimizers that scripts make themselves and hand to `initialize`."""

from offload.deepspeed.ops import adam

__all__ = ["adam"]

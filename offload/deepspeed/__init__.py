"""DeepSpeed's way of training, over this library: `import offload.deepspeed as deepspeed`.

`initialize` takes the same configuration; `use_io_engine` lets DeepSpeed itself swap through this library's I/O engine.
"""

from typing import Any

from offload.deepspeed import comm, ops, zero
from offload.deepspeed.aio import aio_handle, use_io_engine
from offload.deepspeed.comm import get_accelerator, init_distributed
from offload.deepspeed.engine import DeepSpeedEngine
from offload.deepspeed.initialize import add_config_arguments, initialize
from offload.deepspeed.keys import KEYS, Fate

__all__ = [
    "KEYS",
    "DeepSpeedEngine",
    "Fate",
    "add_config_arguments",
    "aio_handle",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "ops",
    "use_io_engine",
    "zero",
]

_ELSEWHERE = {
    "checkpointing": "blocks recompute by themselves: call them without deepspeed.checkpointing",
    "moe": "experts are ordinary modules here: use the model's own",
    "pipe": "give the plain module to initialize: its blocks are streamed one by one",
    "PipelineModule": "give the plain module to initialize: its blocks are streamed one by one",
    "init_inference": "this library trains; generate with the module under torch.no_grad()",
    "tp_model_init": "one process: leave it out",
    "utils": "engine.module_state_dict() and deepspeed.zero.GatheredParameters give whole parameters; in place of "
    "zero_to_fp32, offload.export(engine.module, DIR, dtype=torch.float32) writes the masters",
}


def __getattr__(name: str) -> Any:
    """Say what to do instead of what DeepSpeed has and this package has not."""
    if name in _ELSEWHERE:
        raise AttributeError(f"offload.deepspeed has no {name}: {_ELSEWHERE[name]}")
    raise AttributeError(f"offload.deepspeed has no {name}; it has {', '.join(__all__)}")

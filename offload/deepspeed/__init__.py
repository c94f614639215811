"""DeepSpeed's way of training, over this library: `import offload.deepspeed as deepspeed`.

`initialize` takes the same configuration; `use_io_engine` lets DeepSpeed itself swap through this library's I/O engine.
"""

from offload.deepspeed.aio import aio_handle, use_io_engine
from offload.deepspeed.engine import DeepSpeedEngine
from offload.deepspeed.initialize import add_config_arguments, init_distributed, initialize
from offload.deepspeed.keys import KEYS, Fate

__all__ = [
    "KEYS",
    "DeepSpeedEngine",
    "Fate",
    "add_config_arguments",
    "aio_handle",
    "init_distributed",
    "initialize",
    "use_io_engine",
]

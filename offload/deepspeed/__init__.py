"""DeepSpeed's way of training, over this library: `import offload.deepspeed as deepspeed`.

`initialize` takes the same configuration; `use_io_engine` lets DeepSpeed itself swap through this library's I/O engine.
"""

from typing import Any

from offload.deepspeed import accelerator, comm, elsewhere, ops, runtime, utils, zero
from offload.deepspeed.accelerator import get_accelerator
from offload.deepspeed.aio import aio_handle, use_io_engine
from offload.deepspeed.comm import init_distributed
from offload.deepspeed.engine import DeepSpeedEngine
from offload.deepspeed.initialize import add_config_arguments, initialize
from offload.deepspeed.keys import KEYS, Fate

__all__ = [
    "KEYS",
    "DeepSpeedEngine",
    "Fate",
    "accelerator",
    "add_config_arguments",
    "aio_handle",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "ops",
    "runtime",
    "use_io_engine",
    "utils",
    "zero",
]


__version__ = "0.19.8"
"""Of the DeepSpeed whose manners these are, for scripts that compare it."""


def __getattr__(name: str) -> Any:
    """Say what to do instead of what DeepSpeed has and this package has not."""
    raise AttributeError(elsewhere.says(name, __all__))


elsewhere.answer_imports(__name__, __all__)

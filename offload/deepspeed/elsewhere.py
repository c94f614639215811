"""What DeepSpeed has and `offload.deepspeed` has not: what to do instead, for attributes and for imports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_PLAIN_MODULE = "give the plain module to initialize: its blocks are streamed one by one"
_ASKED_BY_FILE = "any key of the configuration that asks for it is answered in docs/deepspeed.md"

_INSTEAD = {
    "accelerator": "deepspeed.get_accelerator() answers for the device",
    "checkpoint": "engine.save_checkpoint and engine.module_state_dict() copy what they write: leave it out",
    "checkpointing": "blocks recompute by themselves: call them without deepspeed.checkpointing",
    "compression": _ASKED_BY_FILE,
    "elasticity": _ASKED_BY_FILE,
    "inference": "this library trains; generate with the module under torch.no_grad()",
    "init_inference": "this library trains; generate with the module under torch.no_grad()",
    "launcher": "one process: start the script with python",
    "moe": "experts are ordinary modules here: use the model's own",
    "monitor": "log engine.get_lr(), engine.get_global_grad_norm() and the loss in the loop, with the writer you use",
    "ops.lamb": "LAMB is not among the updates made here: docs/optimizers.md lists them, Adafactor among them",
    "ops.lion": "offload.Lion has its arguments and its update",
    "ops.op_builder": "nothing is compiled when it is imported: leave the builder out",
    "pipe": _PLAIN_MODULE,
    "PipelineModule": _PLAIN_MODULE,
    "profiling": "offload plan counts FLOPs before the run",
    "runtime": 'its inner classes have no counterpart. WarmupLR and the like are named in "scheduler" of the '
    "configuration, or are given to initialize(lr_scheduler=) as torch.optim.lr_scheduler has them",
    "tp_model_init": "one process: leave it out",
    "utils": "engine.module_state_dict() and deepspeed.zero.GatheredParameters give whole parameters; in place of "
    "zero_to_fp32, offload.export(engine.module, DIR, dtype=torch.float32) writes the masters",
}

_INSTEAD_OF_ENGINES = {
    "monitor": _INSTEAD["monitor"],
    "timers": "engine.offload.last_step has the seconds of the last step and what it waited for",
    "_config": "engine.config is the configuration, as a dict",
    "load_module_state_dict": "load into the module before initialize, or a checkpoint with engine.load_checkpoint",
    "offload_states": "the engine keeps within device_memory by itself: give less of it in the section offload",
    "reload_states": "the engine fetches what it computes with: leave it out",
    "data_parallel_group": "one process: there is no group",
    "mpu": "one process: there is no group",
}


def engine_says(name: str) -> str:
    """What to do instead of an attribute of DeepSpeed's engine."""
    return _INSTEAD_OF_ENGINES.get(name, "docs/deepspeed.md says what there is instead")


def says(name: str, present: Sequence[str]) -> str:
    """The message for a dotted name inside the package that is not among those `present`."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    instead = next((_INSTEAD[prefix] for prefix in prefixes if prefix in _INSTEAD), None)
    if instead is None:
        return f"offload.deepspeed has no {name}; it has {', '.join(present)}"
    return f"offload.deepspeed has no {name}: {instead}"


class _Finder:
    """The last to be asked for a module: says what is to be used in place of one of DeepSpeed's."""

    def __init__(self, package: str, present: Sequence[str]) -> None:
        self._prefix, self._present = package + ".", present

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raises ImportError for a module of the package; every other one is somebody else's."""
        if not name.startswith(self._prefix):
            return None
        # No ModuleNotFoundError: `from package import name` would put its own words in the place of these.
        raise ImportError(says(name.removeprefix(self._prefix), self._present), name=name)


def answer_imports(package: str, present: Sequence[str]) -> None:
    """From now on an import of a module that `package` has not is refused with what to do instead."""
    sys.meta_path.append(_Finder(package, present))

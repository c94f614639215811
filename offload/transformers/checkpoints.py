"""Files of the Trainer: model directories written block by block, and the training state beside them."""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any

from torch import nn

from offload.checkpoint import resume, save
from offload.checkpoint.export import export
from offload.errors import CheckpointError
from offload.model.blocks import base_of
from offload.runtime.training_state import random_states, set_random_states

__all__ = ["check_has_state", "load_state", "save_state", "set_random_states", "write_model"]

STATE_DIRECTORY = "offload_state"
_WEIGHTS = re.compile(r"^(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?$")


def write_model(model: nn.Module, directory: str, processing: Any) -> None:
    """Write a wrapped model for `from_pretrained`, or its adapter, in place of what `directory` holds of one.

    The new weights are complete before the old ones go. `processing`: a tokenizer or processor, or None.
    """
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=directory) as new:
        export(model, new, tokenizer=processing, adapter_only=base_of(model) is not model)
        written = sorted(os.listdir(new))
        for name in os.listdir(directory):
            if _WEIGHTS.match(name):
                os.unlink(os.path.join(directory, name))
        for name in written:
            os.replace(os.path.join(new, name), os.path.join(directory, name))


def save_state(model: nn.Module, directory: str, beside: dict[str, Any]) -> None:
    """The complete training state, with that of what is `beside` it (a scheduler), in place of what is there."""
    save(model, os.path.join(directory, STATE_DIRECTORY), state=beside, keep_last=1)


def check_has_state(directory: str) -> None:
    """Raise CheckpointError where `save_state` has not been."""
    if not os.path.isdir(directory):
        raise CheckpointError(
            f"{directory}: no such directory: name a checkpoint of OffloadTrainer to go on from"
        )
    if not os.path.isdir(os.path.join(directory, STATE_DIRECTORY)):
        raise CheckpointError(
            f"{directory} has no {STATE_DIRECTORY}: it was not saved by OffloadTrainer, or with save_only_model. To go "
            "on from its weights alone, load the model from it and train without resume_from_checkpoint"
        )


def load_state(model: nn.Module, directory: str, beside: dict[str, Any]) -> dict[str, Any]:
    """Undo `save_state`; the random states that it had."""
    check_has_state(directory)
    resume(model, os.path.join(directory, STATE_DIRECTORY), state=beside)
    return random_states()

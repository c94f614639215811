"""Models of diffusers: which they are, and what is different in their directories."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import nn

from offload.errors import ConfigError

STEM = "diffusion_pytorch_model"
"""What files of weights are called, without what says which and of what kind."""
_CLASS = "_class_name"


def is_of_diffusers(model: nn.Module) -> bool:
    """Whether diffusers writes and reads its directories."""
    utils: Any = sys.modules.get("diffusers.models.modeling_utils")
    return utils is not None and isinstance(model, utils.ModelMixin)


def config_of(directory: str) -> dict[str, Any] | None:
    """The configuration of a directory that diffusers has written; None of any other."""
    path = os.path.join(directory, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be understood: {error}") from error
    return config if isinstance(config, dict) and _CLASS in config else None


def make(config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model that `config` describes, in `dtype` but for what its class keeps in fp32, which diffusers leaves alone
    too. Raises ConfigError where the class is not to be had."""
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(
            f"{config[_CLASS]} is a model of diffusers, which is not installed: pip install diffusers"
        ) from error
    kind: Any = getattr(diffusers, config[_CLASS], None)
    if kind is None:
        raise ConfigError(
            f"diffusers {diffusers.__version__} has no model {config[_CLASS]}: another version may"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: nn.Module = kind.from_config(config)
    finally:
        torch.set_default_dtype(before)
    for name in getattr(model, "_keep_in_fp32_modules", None) or ():
        for path, parameter in model.named_parameters():
            if name in path.split("."):
                parameter.data = parameter.data.float()
    return model

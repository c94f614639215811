"""Any model as a module of shapes: from a preset's name, a Hugging Face directory or a `config.json`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from offload.errors import ConfigError
from offload.model.loading import dtype_of
from offload.model.presets import Decoder, shape_of


def model_on_meta(source: str, dtype: str = "auto", *, layers_max: int | None = None) -> nn.Module:
    """The model that `source` names, on the meta device: no memory, no weights read.

    `source`: a preset (`gpt3-13b`, `175b`, see `offload.model.presets.SHAPES`), a directory with a `config.json`, or
    such a file. `dtype`: "auto" (the config's; bfloat16 for a preset), "bfloat16" or "float32". `layers_max`: a preset
    has no more layers than that. Raises ConfigError where nothing of that name is known, or transformers is needed and
    missing.
    """
    wanted = dtype_of(dtype)
    if os.path.exists(source):
        return _from_config(source, wanted)
    if os.sep in source or source.endswith(".json"):
        raise ConfigError(f"{source}: no such directory or file")
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted or torch.bfloat16)
    try:
        with torch.device("meta"):
            shape = shape_of(source)
            return Decoder(replace(shape, layers=min(shape.layers, layers_max or shape.layers))).train()
    finally:
        torch.set_default_dtype(before)


def _from_config(path: str, dtype: torch.dtype | None) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading a model's config needs transformers (pip install 'offload[hf]'); "
            "presets such as llama-7b work without it"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: holds no model configuration that transformers knows: {error}") from error
    architectures = getattr(config, "architectures", None) or []
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    make = transformers.AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    with torch.device("meta"):
        return cast(nn.Module, make(config, dtype=dtype or config.dtype or torch.bfloat16)).train()

"""Adapters of `peft` (LoRA, DoRA) at export: merged into their base weights one layer at a time, or by themselves."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from offload.errors import ConfigError
from offload.model.blocks import base_of
from offload.model.quantized import is_quantized
from offload.runtime.hooks import without_state_hooks

_PREFIX = "base_model.model."


def _tuned(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers with adapters, by name; where peft has put them into a model of its own, or into this one."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    return (
        []
        if tuners is None
        else [(n, m) for n, m in model.named_modules() if isinstance(m, tuners.BaseTunerLayer)]
    )


def has_adapters(model: nn.Module) -> bool:
    """Whether an export merges any."""
    return base_of(model) is not model or bool(_tuned(model))


class Merge:
    """Turns the tensors of one block into those of the base model, with the active adapters merged.

    `root` are the tensors outside all blocks, by name: adapters may be among them. Meta tensors give names and shapes.
    """

    def __init__(self, model: nn.Module, root: dict[str, torch.Tensor]) -> None:
        self._root = root
        self._layers: dict[str, Any] = {}
        self._saved: dict[str, str] = {}
        for name, layer in _tuned(model):
            if not any(name.startswith(outer + ".") for outer in self._layers):
                self._layers[name] = layer
        other: Any = sys.modules.get("peft.utils.other")
        for name, module in model.named_modules() if other is not None else ():
            if isinstance(module, other.ModulesToSaveWrapper):
                self._saved[name] = module.active_adapters[0]

    def __call__(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's tensors under the base model's names."""
        if not self._layers and not self._saved:
            return tensors
        plain: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if self._layer_of(name) is None:
                plain |= self._outside(name, tensor)
        for path, layer in self._layers.items():
            held = {n for n, _ in layer.named_parameters() if "base_layer." in n and f"{path}.{n}" in tensors}
            if held:
                plain |= self._merged(path, layer, held, {**self._root, **tensors})
        return {name.removeprefix(_PREFIX).replace(".base_layer", ""): t for name, t in plain.items()}

    def _layer_of(self, name: str) -> str | None:
        return next((path for path in self._layers if name.startswith(path + ".")), None)

    def _outside(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        for path, adapter in self._saved.items():
            trained = f"{path}.modules_to_save.{adapter}."
            if name.startswith(trained):
                return {f"{path}.{name[len(trained) :]}": tensor}
            if name.startswith((f"{path}.original_module.", f"{path}.modules_to_save.")):
                return {}
        return {name: tensor}

    @staticmethod
    def _merged(
        path: str, layer: Any, base_names: set[str], tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The layer's base weights with its adapters added by peft itself, in a copy of the layer."""
        given: dict[int, Any] = without_state_hooks(layer)
        for name, parameter in layer.named_parameters():
            tensor = tensors[f"{path}.{name}"]
            if tensor.device.type != "meta" and name in base_names:
                tensor = tensor.clone()  # the sum is made in place
            given[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
        if any(tensors[f"{path}.{n}"].device.type == "meta" for n, _ in layer.named_parameters()):
            return {f"{path}.{n}": tensors[f"{path}.{n}"] for n in sorted(base_names)}
        merged = copy.deepcopy(layer, given)
        if is_quantized(layer.get_base_layer()):
            _make_dense(merged)
        with torch.no_grad():
            merged.merge()
        return {f"{path}.{n}": dict(merged.named_parameters())[n].data for n in sorted(base_names)}


def _make_dense(layer: Any) -> None:
    """Let a layer of peft over a quantized weight, in whose place a dense one is now, merge as over a plain one."""
    lora: Any = sys.modules["peft.tuners.lora.layer"]
    base = layer.get_base_layer()
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight, plain.bias = base.weight, base.bias
    layer.base_layer = plain
    layer.__class__ = lora.Linear
    layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False


def write_adapter(model: nn.Module, tensors: dict[str, torch.Tensor], out_dir: str) -> None:
    """Write the adapter's directory as peft does. Raises ConfigError for a model without one."""
    if base_of(model) is model:
        raise ConfigError(
            f"{type(model).__name__} has no adapter of its own: it was not made by peft.get_peft_model. Of adapters "
            "that were put into it, peft.get_peft_model_state_dict(model, model.state_dict()) has the tensors"
        )
    save: Any = model.save_pretrained
    save(out_dir, state_dict=tensors, save_embedding_layers=False)

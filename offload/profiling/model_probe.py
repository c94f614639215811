"""The rates of a model's own blocks here, from its shapes alone: two blocks and the root, with made-up weights."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import psutil
import torch
from torch import nn

from offload.errors import ConfigError
from offload.model.blocks import cut
from offload.profiling.block_probe import BlockProbe, measure
from offload.profiling.compute_probe import UpdateLoop
from offload.profiling.workload import profile_model, token_inputs

N_BLOCKS = 2
"""As many as follow each other without finding their weights in a cache."""
TOKENS_MAX = 512
TOKENS_MIN = 16
STEP_S = 1.5
"""Rows are so many that a step takes about as long; six are made."""
_AVAILABLE_SHARE = 4
_PLANE_NBYTES = 4


def model_rates(model: nn.Module, matmul_flops_per_s: dict[str, float]) -> dict[str, Any]:
    """Fields of `Hardware` that a model's own work on a CPU gives: `work_flops_per_s` and what computing and updating
    take from each other, for a micro-batch of one sequence.

    Its 16 to 512 tokens are those that `matmul_flops_per_s` (by dtype) gets through in a few seconds. `model` may be
    on the meta device, and is left as it is. Raises ConfigError where it does not take token ids, its blocks are in no
    list, or two of them and the root take more than a quarter of the memory that is available.
    """
    small = _of_few_blocks(model)
    dtype = str(next(p.dtype for p in cut(small).blocks[0][1].parameters())).removeprefix("torch.")
    flops_per_token = 8 * sum(p.numel() for p in small.parameters())
    wanted = STEP_S * matmul_flops_per_s.get(dtype, 1e10) / flops_per_token
    tokens = max(TOKENS_MIN, min(TOKENS_MAX, int(wanted)))
    workload = profile_model(small, tokens)
    args, kwargs = token_inputs(small, 1, tokens)

    def loss(module: nn.Module) -> torch.Tensor:
        found = module(*args, **kwargs)
        value = getattr(found, "loss", found)
        value = found.logits if value is None else value
        return value if value.dim() == 0 else value.float().mean()

    updates = UpdateLoop()
    try:
        found = asdict(measure(BlockProbe(small, workload, 1, loss), updates, None))
    finally:
        updates.close()
    return {**found, "work_dtype": dtype, "launch_overhead_s": 0.0}


def _of_few_blocks(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU with its first blocks only; weights small and random, so that nothing overflows."""
    blocks = cut(model).blocks
    parent_name, _, number = blocks[0][0].rpartition(".")
    parent = model.get_submodule(parent_name)
    if not isinstance(parent, nn.ModuleList) or number != "0":
        raise ConfigError(f"{type(model).__name__}: its blocks are in no list, so that none can be left out")
    owner_name, _, attribute = parent_name.rpartition(".")
    owner = model.get_submodule(owner_name)
    setattr(owner, attribute, nn.ModuleList(list(parent)[:N_BLOCKS]))
    try:
        nbytes = sum(p.numel() * (p.element_size() + _PLANE_NBYTES) for p in model.parameters())
        available = psutil.virtual_memory().available
        if nbytes * _AVAILABLE_SHARE > available:
            raise ConfigError(
                f"{type(model).__name__}: {N_BLOCKS} blocks and the root take {nbytes / 1e9:.1f} GB to measure, and "
                f"{available / 1e9:.1f} GB are available"
            )
        small = copy.deepcopy(model)
    finally:
        setattr(owner, attribute, parent)
    small.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02)
            else:
                tensor.zero_()
        for module in small.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.fill_(1.0)  # type: ignore[operator]
    return small.train()

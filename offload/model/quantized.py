"""Frozen base weights in 8 or 4 bits, as `bitsandbytes` loads them: what its modules keep beside the parameter.

Its 8-bit layers compute with a second reference to the weights, which would stay in memory when the parameter's bytes
go to storage; its 4-bit layers may repack the weights on their first use on some CPUs, which a later fetch would undo.
Both are told to compute with the parameter's present bytes. Scales (one per row, or per 64 weights) stay in memory.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from offload.errors import ConfigError


def _compute_with_parameter(module: Any, _inputs: Any) -> None:
    module.state.CB = module.weight.data


def prepare_quantized(model: nn.Module) -> list[Any]:
    """Let quantized layers follow their parameters. Returns the handles of the hooks that do it.

    Raises ConfigError for weights that have been repacked already.
    """
    handles = []
    for name, module in model.named_modules():
        kind: Any = module
        if not type(module).__module__.startswith("bitsandbytes."):  # peft has classes of the same names
            continue
        if type(module).__name__ == "Linear8bitLt" and not kind.state.has_fp16_weights:
            if kind.weight.CB is not None:
                kind.init_8bit_state()
            kind.state.CB = None
            handles.append(module.register_forward_pre_hook(_compute_with_parameter))
        elif hasattr(module, "support_avx512bf16_for_cpu"):
            state = getattr(kind.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ConfigError(
                    f"{name}: its 4-bit weights have been repacked by running the model in evaluation mode: wrap it "
                    "before it is first used"
                )
            kind.support_avx512bf16_for_cpu = False
    return handles

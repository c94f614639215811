"""What scripts ask a parameter at stage 3 before they gather it: `ds_id`, `ds_status`, `ds_shape`, `ds_numel`.

Nothing is partitioned here, but a parameter whose block is away has no values outside `GatheredParameters` either. A
script that does not find these names takes a parameter for whole, and saves what is not there.
"""

from __future__ import annotations

import enum
import itertools
from typing import Any

import torch

from offload.runtime.engine import OffloadEngine

_ids = itertools.count()


class ZeroParamStatus(enum.Enum):
    """Whether a parameter holds its values."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def mark(engine: OffloadEngine) -> None:
    """Let every parameter that the engine owns say that it is to be gathered."""
    for block in [engine.root, *engine.blocks]:
        for buffer in block.layout.buffers:
            for segment in buffer.segments:
                parameter: Any = segment.parameter
                parameter.ds_id = next(_ids)
                parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
                parameter.ds_shape = torch.Size(segment.shape)
                parameter.ds_numel = segment.numel


def set_status(parameter: torch.Tensor, status: ZeroParamStatus) -> None:
    """Of a marked parameter; any other stays as it is."""
    if hasattr(parameter, "ds_status"):
        parameter.ds_status = status

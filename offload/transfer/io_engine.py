"""Typed face of the engine's requests and of the update pipeline in `offload._C`, for the rooms above the tiers."""

from offload._C import (
    Engine,
    Hyper,
    Ticket,
    UpdateJob,
    UpdatePipeline,
    canonicalize_nan,
    crc32c,
    merge_master,
    split_master,
)

__all__ = [
    "Engine",
    "Hyper",
    "Ticket",
    "UpdateJob",
    "UpdatePipeline",
    "canonicalize_nan",
    "crc32c",
    "merge_master",
    "split_master",
]

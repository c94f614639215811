"""How many bytes a commit record has room for; plain arithmetic, which plans made without a model do too."""

from __future__ import annotations

from offload.types import PAGE_NBYTES, round_up

RECORD_NBYTES_FIXED = 1 << 20
"""Room in a commit record for what the user tracks, random states and hyperparameters."""


def record_room_nbytes(n_buffers: int, n_chunks: int, n_tensors: int, statistics_nbytes: int) -> int:
    """256 bytes a flat buffer, 24 a chunk, 32 a parameter tensor, the rule's statistics, and the fixed part."""
    nbytes = RECORD_NBYTES_FIXED + 256 * n_buffers + 24 * n_chunks + 32 * n_tensors + statistics_nbytes
    return round_up(nbytes, PAGE_NBYTES)

"""Which optimizers update out of core, and what state each keeps: one table, from which all bytes and names follow.

A chunk's record of optimizer state is `lo` (of a split_bf16 buffer) and the rule's planes, end to end, in whole pages.
`csrc/optim/record.h` computes the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from offload.errors import ConfigError
from offload.types import PAGE_NBYTES, round_up

PlaneKind = Literal["float32", "bfloat16", "int8", "uint8"]
Moments = Literal["fp32", "bf16", "8bit"]
"""What moments are kept in: fp32; bf16, rounded at random; 8 bits with an fp32 scale for every 256 elements."""

QUANT_BLOCK_ELEMENTS = 256
"""Elements that share one scale of an 8-bit plane."""

_NBYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}
LO_NBYTES = {"split_bf16": 2, "fp32": 0}
"""Bytes of the master that are not in the parameter plane, by codec."""
STATISTICS_NBYTES_FIXED = 512
"""Of what JSON takes of a parameter's statistics beside their elements."""

_MOMENTS: dict[str, dict[str, PlaneKind]] = {
    "fp32": {"signed": "float32", "unsigned": "float32"},
    "bf16": {"signed": "bfloat16", "unsigned": "bfloat16"},
    "8bit": {"signed": "int8", "unsigned": "uint8"},
}
_PLANES: dict[str, dict[str, str]] = {
    "adamw": {"exp_avg": "signed", "exp_avg_sq": "unsigned"},
    "sgd": {"momentum_buffer": "signed"},
    "lion": {"exp_avg": "signed"},
}
MOMENTS = tuple(_MOMENTS)
RULES = tuple(_PLANES)
"""Rules with a kernel of their own. Adam is adamw with another weight decay."""


@dataclass(frozen=True)
class Plane:
    """One plane of state. `kind`: float32, bfloat16, or int8 (signed) and uint8 (never negative): codes and scales."""

    name: str
    kind: PlaneKind

    @property
    def is_quantised(self) -> bool:
        """Whether it is made of 8-bit codes and scales."""
        return self.kind in ("int8", "uint8")

    def nbytes(self, n: int) -> int:
        """Bytes of `n` elements."""
        scales = -(-n // QUANT_BLOCK_ELEMENTS) * 4 if self.is_quantised else 0
        return n * _NBYTES[self.kind] + scales

    @property
    def nbytes_per_element(self) -> float:
        """Bytes of one element, its share of a scale included."""
        return self.nbytes(QUANT_BLOCK_ELEMENTS) / QUANT_BLOCK_ELEMENTS


@dataclass(frozen=True)
class UpdateRule:
    """`name`: one of RULES, or `callback`: a function of the optimizer's own updates staged chunks."""

    name: str
    planes: tuple[Plane, ...]
    title: str = ""
    """Of a callback: the optimizer's name, for messages and checkpoints."""
    whole_gradients: bool = False
    """Whether all gradients of a parameter are looked at before its first element is updated, and sums of them by row
    and column are kept in host memory."""

    @property
    def kinds(self) -> list[str]:
        """Of the planes, in order."""
        return [plane.kind for plane in self.planes]

    @property
    def is_callback(self) -> bool:
        """Whether Python makes the update."""
        return self.name == "callback"

    @property
    def made_on_device(self) -> bool:
        """Whether a device with memory of its own can make the update, where the state is in its memory."""
        return self.name in RULES and self.in_fp32

    @property
    def in_fp32(self) -> bool:
        """Whether every plane is fp32."""
        return all(plane.kind == "float32" for plane in self.planes)

    @property
    def key(self) -> str:
        """Rule and format of its moments, as hardware profiles name it: `adamw_fp32`, `lion_8bit`, `sgd` without
        momentum; of a callback its title."""
        if self.is_callback or not self.planes:
            return self.title or self.name
        formats = {"float32": "fp32", "bfloat16": "bf16"}
        return f"{self.name}_{formats.get(self.planes[0].kind, '8bit')}"

    def record_nbytes(self, codec: str, n: int) -> int:
        """Bytes of the record of a chunk of `n` elements."""
        nbytes = LO_NBYTES[codec] * n + sum(plane.nbytes(n) for plane in self.planes)
        return round_up(nbytes, PAGE_NBYTES)

    def state_nbytes(self, codec: str, n_elements: int, chunk_elements: int) -> int:
        """Bytes of all records of `n_elements`."""
        whole, rest = divmod(n_elements, chunk_elements)
        return whole * self.record_nbytes(codec, chunk_elements) + self.record_nbytes(codec, rest)

    def nbytes_per_element(self, codec: str) -> float:
        """Bytes of state of one element beside the parameter plane; the last page of a record may have some more."""
        return LO_NBYTES[codec] + sum(plane.nbytes_per_element for plane in self.planes)

    def statistics_numel(self, shape: Sequence[int]) -> int:
        """Floats kept in host memory for a parameter of this shape, beside the planes."""
        if not self.whole_gradients:
            return 0
        if len(shape) < 2:
            return math.prod(shape)
        return math.prod(shape[:-2]) * (shape[-2] + shape[-1])

    def encoded_statistics_nbytes(self, shape: Sequence[int]) -> int:
        """What they take in a commit record or a manifest, at most: fp32 in base 64, with their shapes."""
        numel = self.statistics_numel(shape)
        return 4 * -(-4 * numel // 3) + STATISTICS_NBYTES_FIXED if numel else 0

    @property
    def record_nbytes_per_element(self) -> int:
        """What the pipeline's chunk buffers have for an element of a record; never less than AdamW's."""
        return max(10, LO_NBYTES["split_bf16"] + 4 * len(self.planes))

    @property
    def described(self) -> str:
        """For messages: `adamw with exp_avg float32, exp_avg_sq float32`."""
        planes = ", ".join(f"{plane.name} {plane.kind}" for plane in self.planes)
        return f"{self.title or self.name} with {planes or 'no state'}"


def kernel_rule(name: str, moments: str = "fp32", *, has_momentum: bool = True) -> UpdateRule:
    """The rule `name` of RULES. SGD without momentum (`has_momentum=False`) keeps nothing."""
    if name not in _PLANES or moments not in _MOMENTS:
        raise ConfigError(
            f"optimizer {name!r} with optimizer_state={moments!r}: there are {', '.join(RULES)} with "
            f"{', '.join(_MOMENTS)}"
        )
    signs = _PLANES[name] if has_momentum or name != "sgd" else {}
    return UpdateRule(name, tuple(Plane(plane, _MOMENTS[moments][sign]) for plane, sign in signs.items()))


def callback_rule(title: str, names: Sequence[str], *, whole_gradients: bool = False) -> UpdateRule:
    """A rule made in Python, with fp32 planes of these names."""
    return UpdateRule("callback", tuple(Plane(name, "float32") for name in names), title, whole_gradients)


ADAMW = kernel_rule("adamw")

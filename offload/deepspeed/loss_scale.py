"""The scale of the loss in fp16, so that small gradients are not lost: fixed, or searched for while training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from offload.deepspeed.config import get
from offload.errors import UsageError

logger = logging.getLogger("offload")


class LossScale:
    """A fixed scale. `update(overflow)` after every step."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def update(self, overflow: bool) -> None:
        """A fixed scale stays."""
        if overflow:
            logger.warning("gradients are not finite at loss scale %g: the step is skipped", self.scale)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was saved."""
        for name in vars(self):
            setattr(self, name, state.get(name, getattr(self, name)))


class DynamicLossScale(LossScale):
    """Doubles after `window` steps without overflow; an overflow uses up one of `hysteresis`, the last one halves it.

    As DeepSpeed's, whose keys these are: any halving leaves the hysteresis used up until the scale doubles, or until a
    good step when `consecutive_hysteresis` is set. Raises UsageError on an overflow at `scale_min`.
    """

    def __init__(
        self,
        scale: float,
        *,
        window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        scale_min: float = 1.0,
    ) -> None:
        super().__init__(scale)
        self.window, self.hysteresis, self.consecutive_hysteresis = window, hysteresis, consecutive_hysteresis
        self.scale_min = scale_min
        self.left = hysteresis
        self.n_steps = 0
        self.last_overflow = -1

    def update(self, overflow: bool) -> None:
        """One step has been made, or skipped for `overflow`."""
        if overflow:
            self._overflowed()
        else:
            if self.consecutive_hysteresis:
                self.left = self.hysteresis
            good = self.n_steps - self.last_overflow - 1
            if good > 0 and good % self.window == 0:
                self.left = self.hysteresis
                self.scale *= 2
        self.n_steps += 1

    def _overflowed(self) -> None:
        self.last_overflow = self.n_steps
        if self.left > 1:
            self.left -= 1
            logger.info("overflow at loss scale %g: the step is skipped, the scale stays", self.scale)
            return
        if self.scale <= self.scale_min:
            raise UsageError(
                f"gradients overflow fp16 at the smallest loss scale, {self.scale:g} (fp16.min_loss_scale): training "
                "diverges; lower the learning rate, clip gradients, or use bf16"
            )
        reduced = max(self.scale / 2, self.scale_min)
        logger.info(
            "overflow at loss scale %g: the step is skipped, the scale goes to %g", self.scale, reduced
        )
        self.scale = reduced


def from_config(config: Mapping[str, Any], *, is_fp16: bool) -> LossScale:
    """The scale that the section `fp16` describes; 1 when nothing is computed in fp16."""
    if not is_fp16:
        return LossScale()
    fixed = float(get(config, "fp16.loss_scale", 0))
    if fixed:
        return LossScale(fixed)
    return DynamicLossScale(
        2.0 ** int(get(config, "fp16.initial_scale_power", 16)),
        window=int(get(config, "fp16.loss_scale_window", 1000)),
        hysteresis=int(get(config, "fp16.hysteresis", 2)),
        consecutive_hysteresis=bool(get(config, "fp16.consecutive_hysteresis", False)),
        scale_min=float(get(config, "fp16.min_loss_scale", 1)),
    )

"""DeepSpeed's learning-rate schedules, by name and by closed formula of the step.

Formulas from DeepSpeed's documentation (docs/code-docs/source/schedulers.rst) and the behaviour of 0.19's
`runtime/lr_schedules.py`; the cycle is that of L. N. Smith, "A disciplined approach to neural network
hyper-parameters" (2018). `t` counts calls of `step()` from 0; before the first, an optimizer has the schedule's
lowest rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload.errors import ConfigError

PerGroup = float | Sequence[float]


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"scheduler.params.{name}={value!r}: must be a whole number of at least 1")
    return value


class Schedule:
    """A schedule over an optimizer's groups: `step`, `get_lr`, `get_last_lr`, `state_dict`, `load_state_dict`."""

    def __init__(self, optimizer: torch.optim.Optimizer, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] = []

    def _start(self) -> None:
        if self.last_batch_iteration == -1:
            self._apply(self._before())

    def _before(self) -> list[float]:
        """Rates before the first step."""
        raise ConfigError(f"{type(self).__name__} has no rates before its first step")

    def get_lr(self) -> list[float]:
        """Rates of the groups at `last_batch_iteration`."""
        raise ConfigError(f"{type(self).__name__} has no rates")

    def get_last_lr(self) -> list[float]:
        """Rates that were set last."""
        return list(self._last_lr)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go on by one step, or to the given one, and set the optimizer's rates."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = following if last_batch_iteration is None else last_batch_iteration
        self._apply(self.get_lr())

    def _apply(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = list(rates)

    def per_group(self, name: str, value: PerGroup) -> list[float]:
        """`value` for each group. Raises ConfigError when it is a list of another length."""
        n_groups = len(self.optimizer.param_groups)
        if isinstance(value, (list, tuple)):
            if len(value) != n_groups:
                raise ConfigError(
                    f"scheduler.params.{name} has {len(value)} values, the optimizer has {n_groups} groups"
                )
            return [float(v) for v in value]
        return [float(value)] * n_groups  # type: ignore[arg-type]  # a number by now

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved; the rates are those of that step."""
        self.last_batch_iteration = int(state["last_batch_iteration"])
        self._apply(self._before() if self.last_batch_iteration < 0 else self.get_lr())


class _Warmup(Schedule):
    """Shared by the warm-ups: the share of the way up at step t."""

    def _set_warmup(self, warmup_num_steps: int, warmup_type: str) -> None:
        self.warmup_num_steps = max(2, _positive("warmup_num_steps", warmup_num_steps))
        if warmup_type not in ("log", "linear"):
            raise ConfigError(f'scheduler.params.warmup_type={warmup_type!r}: write "log" or "linear"')
        self.warmup_type = warmup_type

    def _way_up(self) -> float:
        t = self.last_batch_iteration
        if self.warmup_type == "log":
            return math.log(t + 1) / math.log(self.warmup_num_steps)
        return t / self.warmup_num_steps


class WarmupLR(_Warmup):
    """From `warmup_min_lr` to `warmup_max_lr` (default: the optimizer's own), then constant."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = self.per_group("warmup_min_lr", warmup_min_lr)
        self.max_lrs = self.per_group("warmup_max_lr", warmup_max_lr)
        self._set_warmup(warmup_num_steps, warmup_type)
        self._start()

    def _before(self) -> list[float]:
        return list(self.min_lrs)

    def _share(self) -> float:
        return self._way_up() if self.last_batch_iteration < self.warmup_num_steps else self._after()

    def _after(self) -> float:
        return 1.0

    def get_lr(self) -> list[float]:
        """min + (max - min) × the share reached."""
        share = self._share()
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then linearly down to `warmup_min_lr` at `total_num_steps`. What follows the rates is WarmupLR's."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup = 0.001,
        *way_up: Any,
        **named: Any,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, *way_up, **named)

    def _after(self) -> float:
        left = self.total_num_steps - self.last_batch_iteration
        return max(0.0, left / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Shares of the optimizer's own rates: up from `warmup_min_ratio` to 1, then a half cosine to `cos_min_ratio`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self._set_warmup(warmup_num_steps, warmup_type)
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._start()

    def _before(self) -> list[float]:
        return [0.0] * len(self.base_lrs)

    def get_lr(self) -> list[float]:
        """The optimizer's own rates × the ratio reached."""
        return [rate * self._ratio() for rate in self.base_lrs]

    def _ratio(self) -> float:
        if self.last_batch_iteration < self.warmup_num_steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self._way_up()
        passed = self.last_batch_iteration - self.warmup_num_steps + 1
        progress = min(1.0, passed / max(1, self.total_num_steps - self.warmup_num_steps))
        return self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2


class LRRangeTest(Schedule):
    """`lr_range_test_min_lr` × (1 + rate × t / size), continuously or in stairs; for finding a good rate."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lrs = self.per_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _positive("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate, self.staircase = lr_range_test_step_rate, lr_range_test_staircase
        self._start()

    def _before(self) -> list[float]:
        return list(self.min_lrs)

    def get_lr(self) -> list[float]:
        """Rates at the interval reached."""
        interval = (self.last_batch_iteration + 1) / self.step_size
        interval = math.floor(interval) if self.staircase else interval
        return [low * (1 + self.step_rate * interval) for low in self.min_lrs]


class OneCycle(Schedule):
    """Rates up and down once (and the first beta down and up), then a decay.

    `cycle_*_stair_count` holds them flat on that many stairs of each half. After the cycle the rates are the lowest,
    divided by 1 + `decay_lr_rate` × steps / `decay_step_size`; the first beta is the highest, times 1 +
    `decay_mom_rate` × the same. The second beta is 0.99 throughout.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.first = float(cycle_first_step_size)
        self.second = self.first if cycle_second_step_size is None else float(cycle_second_step_size)
        if self.first <= 0 or self.second < 0:
            raise ConfigError(
                f"scheduler.params: cycle_first_step_size={cycle_first_step_size} must be positive and "
                f"cycle_second_step_size={cycle_second_step_size} not negative"
            )
        second_stairs = (
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        )
        self.stairs = (cycle_first_stair_count, second_stairs)
        self.decay_step_size = decay_step_size
        self.decay_lr_rate, self.decay_mom_rate = decay_lr_rate, decay_mom_rate
        self.min_lrs = self.per_group("cycle_min_lr", cycle_min_lr)
        self.max_lrs = self.per_group("cycle_max_lr", cycle_max_lr)
        self.cycle_momentum = cycle_momentum and "betas" in optimizer.defaults
        self.min_moms = self.per_group("cycle_min_mom", cycle_min_mom)
        self.max_moms = self.per_group("cycle_max_mom", cycle_max_mom)
        if self.cycle_momentum and last_batch_iteration == -1:
            self._set_momentum(self.min_moms)
        self._start()

    def _before(self) -> list[float]:
        return list(self.min_lrs)

    def _set_momentum(self, values: list[float]) -> None:
        for group, value in zip(self.optimizer.param_groups, values, strict=True):
            group["betas"] = (value, 0.99)

    def _height(self) -> float:
        """How far up the cycle is: 0 at both ends, 1 at the peak."""
        at = (self.last_batch_iteration + 1) % (self.first + self.second)
        rising = at <= self.first
        height = at / self.first if rising else (self.first + self.second - at) / self.second
        stairs = self.stairs[0 if rising else 1]
        return math.floor(height * stairs + 1e-9) / stairs if stairs > 0 else height

    def _decayed(self, rate: float) -> float:
        past = self.last_batch_iteration - (self.first + self.second) + 1
        return 1.0 if not self.decay_step_size else 1.0 + rate * past / self.decay_step_size

    @property
    def _in_cycle(self) -> bool:
        return self.last_batch_iteration < self.first + self.second

    def get_lr(self) -> list[float]:
        """Rates in the cycle or after it."""
        if self._in_cycle:
            height = self._height()
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        return [low / self._decayed(self.decay_lr_rate) for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """(first beta, 0.99) of each group; None without `cycle_momentum`."""
        if not self.cycle_momentum:
            return None
        if self._in_cycle:
            height = self._height()
            values = [
                high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)
            ]
        else:
            values = [high * self._decayed(self.decay_mom_rate) for high in self.max_moms]
        return [(value, 0.99) for value in values]

    def _apply(self, rates: list[float]) -> None:
        super()._apply(rates)
        momenta = self.get_mom() if self.last_batch_iteration >= 0 else None
        if momenta is not None:
            self._set_momentum([value for value, _ in momenta])


_BY_NAME: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle)
}


def make(name: str, params: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """The schedule that a configuration names: one of DeepSpeed's, or of torch.optim.lr_scheduler.

    Raises ConfigError for a name or a parameter that does not exist.
    """
    kind: Callable[..., Any] | None = _BY_NAME.get(name) or getattr(torch.optim.lr_scheduler, name, None)
    if kind is None:
        raise ConfigError(
            f"scheduler.type={name!r}: not a schedule; use {', '.join(_BY_NAME)} or one of torch.optim.lr_scheduler"
        )
    try:
        return kind(optimizer, **params)
    except TypeError as error:
        raise ConfigError(f"scheduler.params of {name}: {error}") from error

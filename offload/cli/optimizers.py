"""`--optimizer` and `--optimizer-state`: what they make, and what the planner counts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from offload.errors import ConfigError
from offload.lion import Lion
from offload.update_rules import UpdateRule, callback_rule, kernel_rule

MOMENTUM = 0.9
"""Of --optimizer sgd."""

_MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "lion": Lion,
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM),
    "adafactor": torch.optim.Adafactor,
}
NAMES = tuple(_MAKERS)


def make(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """The optimizer of this name. Raises ConfigError for another one."""
    check(name)
    return _MAKERS[name](groups, lr=lr)


def check(name: str) -> None:
    """Raise ConfigError for a name that --optimizer does not have."""
    if name not in _MAKERS:
        raise ConfigError(f"--optimizer {name} is not known; write one of {', '.join(NAMES)}")


def rule_of(name: str, moments: str) -> UpdateRule:
    """What it keeps. Raises ConfigError for what does not exist."""
    check(name)
    if name != "adafactor":
        return kernel_rule(name, moments)
    if moments != "fp32":
        raise ConfigError(f"--optimizer-state {moments}: adafactor keeps its state in fp32; leave it out")
    return callback_rule("adafactor", (), whole_gradients=True)

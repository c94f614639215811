"""Lion in memory, as a torch optimizer; `offload.wrap` takes it and makes the same update out of core."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from offload.closures import loss_of


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum, with decoupled weight decay.

    One moment a parameter where Adam has two. Use a tenth to a third of AdamW's learning rate and as many times its
    weight decay. `betas`: of the sign's interpolation, and of the momentum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns the closure's loss."""
        loss = loss_of(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad = -parameter.grad if group["maximize"] else parameter.grad
                state = self.state[parameter]
                exp_avg = state.setdefault("exp_avg", torch.zeros_like(parameter))
                update = exp_avg.mul(beta1).add_(grad, alpha=1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
        return loss

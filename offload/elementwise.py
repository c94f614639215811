"""An optimizer of one's own, written in Python, that `offload.wrap` runs out of core chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from offload.closures import loss_of


class ElementwiseOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose update of an element needs that element's parameter, gradient and state alone.

    Subclass it, name the state in `state_names`, and write `update`. Unwrapped it trains in memory like any other;
    wrapped, its state is on storage, 4 bytes an element for each name, and `update` is given 1-D pieces of parameters
    as they pass through memory. A piece may be any part of a parameter, in any order, and several pieces may be updated
    at once in several threads: keep nothing on `self`, and no tensor after `update` has returned. Sums over a parameter
    (norms, factored moments) cannot be had this way.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    """One fp32 tensor, zero at first, for each; at most 8."""

    def init_state(self, param: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        """Fill `state`, in place, before the first update of these elements, where zeros will not do."""

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, torch.Tensor],
        step: int,
        group: dict[str, Any],
    ) -> None:
        """Change `param` and `state` (fp32) in place; `grad` is yours to change. `step` is 1 at first."""
        raise NotImplementedError(f"{type(self).__name__} has no update(param, grad, state, step, group)")

    def apply(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, torch.Tensor],
        step: int,
        group: dict[str, Any],
    ) -> None:
        """`update`, with `init_state` before the first."""
        if step == 1:
            self.init_state(param, state, group)
        self.update(param, grad, state, step, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in memory. Returns the closure's loss."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state.update(
                        {n: torch.zeros_like(parameter, dtype=torch.float32) for n in self.state_names}
                    )
                state["step"] += 1
                planes = {name: state[name].view(-1) for name in self.state_names}
                master = parameter.detach().float().view(-1)
                grad = parameter.grad.detach().float().reshape(-1).clone()
                self.apply(master, grad, planes, state["step"], group)
                if parameter.dtype != torch.float32:
                    parameter.copy_(master.view_as(parameter))
        return loss

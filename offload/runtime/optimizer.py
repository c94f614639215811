"""The optimizer the user's loop sees: a real `torch.optim.Optimizer` whose step is made by the engine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from offload.closures import loss_of
from offload.errors import CheckpointError, ConfigError, UsageError
from offload.runtime import taken_gradients
from offload.runtime.adafactor import AdafactorUpdater
from offload.runtime.chunk_update import CallbackHyper
from offload.runtime.recognised import recognise
from offload.transfer.io_engine import Hyper
from offload.update_rules import UpdateRule

logger = logging.getLogger("offload")


class Stepper(Protocol):
    """What `OffloadOptimizer` asks of the engine."""

    def check_step(self) -> None: ...
    def trains(self, parameter: torch.Tensor) -> bool: ...
    def optimizer_step(self) -> None: ...
    def discard_gradients(self) -> None: ...


@dataclass
class _LastStep:
    """An object of its own, because what stands for the optimizer in a loop (Lightning's) calls its methods on itself,
    and keeps what they assign."""

    has_left_gradients: bool = False
    """Torch would have them still."""


class OffloadOptimizer(torch.optim.Optimizer):
    """The user's optimizer over state kept by the engine.

    Made by `offload.wrap` from the user's optimizer: same parameters, same groups, so LR schedulers attach to it.
    Hyperparameters are read when a block's update is decided: at `step()` in deferred mode, during backward
    otherwise; changing them between backward and `step()` raises UsageError in the latter case. `moments`: what they
    are kept in, "fp32", "bf16" or "8bit".
    """

    def __init__(self, source: torch.optim.Optimizer, moments: str = "fp32") -> None:
        self._recognised = recognise(source, moments)
        if any(len(state) for state in source.state.values()):
            raise ConfigError("the optimizer has state already; wrap it before its first step")
        self.engine: Stepper | None = None
        self._given: torch.optim.Optimizer | None = None
        self._steps: dict[torch.nn.Parameter, int] = {}
        self._used: dict[int, dict[str, Any]] = {}
        self._has_warned = self._has_told = False
        self._last_step = _LastStep()
        self._n_emptied = taken_gradients.n_emptied()
        self.steps_made = 0
        """Calls of `step()` that ended, those before a resume included."""
        self.grad_scale = 1.0
        self.discarded_steps = 0
        """Steps that left the parameters as they were, because their gradients were not finite or too large."""
        self.loss_scale = 1.0
        """What the loss was multiplied with before backward; updates that wait for `step()` divide it out."""
        self.grad_norm: torch.Tensor | None = None
        """Global gradient norm before clipping, of the last step with `max_grad_norm`; without the loss scale."""
        super().__init__([dict(group) for group in source.param_groups], dict(source.defaults))
        self._index_groups()

    def _index_groups(self) -> None:
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        self._number_of = {p: number for number, p in enumerate(self._group_of)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that were trainable when the model was wrapped. Raises UsageError for others."""
        engine: Stepper | None = getattr(self, "engine", None)
        if engine is None:
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        group = {**param_group, "params": [given] if isinstance(given, torch.Tensor) else list(given)}
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if not engine.trains(parameter):
                raise UsageError(
                    f"add_param_group: no step would change a parameter of shape {tuple(parameter.shape)}, because it "
                    "was frozen when offload.wrap was called, or is not the model's: load the model again and "
                    "unfreeze before offload.wrap"
                )
        super().add_param_group(group)
        self._index_groups()

    def state_dict(self) -> dict[str, Any]:
        """The groups' hyperparameters; `state` is empty, for moments and step counts live in the tiers."""
        if self.steps_made and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "optimizer.state_dict() holds hyperparameters only: moments and step counts are saved by offload.save, "
                "and go on with offload.resume"
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the groups' hyperparameters. Raises UsageError for a state that has moments or step counts."""
        if state_dict["state"]:
            raise UsageError(
                f"optimizer.load_state_dict: the moments and step counts of {len(state_dict['state'])} parameters in "
                "this state would be ignored, because they live in the tiers. Save with offload.save and go on with "
                "offload.resume; offload.from_deepspeed converts a DeepSpeed ZeRO checkpoint. To take the "
                "hyperparameters alone, load {**state, 'state': {}}"
            )
        super().load_state_dict(state_dict)

    def __reduce_ex__(self, protocol: object) -> Any:
        """Raises UsageError: copy and pickle would give an optimizer without moments and step counts."""
        raise UsageError(
            "the optimizer of a wrapped model cannot be copied or pickled: its moments and step counts live in the "
            "tiers. Save them with offload.save and go on with offload.resume; optimizer.state_dict() has the "
            "hyperparameters, and offload.export writes the model"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Torch puts new groups in place of the old ones when a state is loaded."""
        super().__setstate__(state)
        self._index_groups()
        if self._given is not None:
            self.share_groups(self._given)

    def share_groups(self, given: torch.optim.Optimizer) -> None:
        """Let updates read what a schedule that was made before `wrap` writes into the groups of the optimizer it
        knows, the one that was given."""
        self._given = given
        given.param_groups[:] = self.param_groups
        given._opt_called = True  # type: ignore[attr-defined]  # or torch warns that its step is never called

    @property
    def rule(self) -> UpdateRule:
        """What a step does with a parameter, and the state it keeps."""
        return self._recognised.rule

    def hyper_of(self, parameter: torch.nn.Parameter, start: int = 0) -> Hyper:
        """Hyperparameters of this step for one parameter, at element `start` of its flat buffer; counts the step."""
        group = self._group_of.get(parameter)
        if group is None:
            raise UsageError(
                f"a trainable parameter of shape {tuple(parameter.shape)} is in no group of the optimizer that "
                "offload.wrap was given: give that one groups for all that is trained, each with hyperparameters of "
                "its own, in place of several optimizers; or freeze it with requires_grad_(False)"
            )
        values = self._recognised.values(group)
        self._used[id(group)] = values
        step = self._steps.get(parameter, 0) + 1
        self._steps[parameter] = step
        if self._recognised.updater is not None:
            return CallbackHyper(
                self._recognised.updater,
                parameter,
                values,
                step=step,
                grad_scale=self.grad_scale,
                start=start,
            )
        return Hyper(
            **values,
            step=step,
            grad_scale=self.grad_scale,
            noise_seed=self._number_of[parameter],
            noise_origin=start,
        )

    @property
    def adafactor(self) -> AdafactorUpdater | None:
        """What keeps Adafactor's statistics; None of another optimizer."""
        updater = self._recognised.updater
        return updater if isinstance(updater, AdafactorUpdater) else None

    def statistics(self, steps: dict[int, int]) -> dict[str, Any]:
        """What the optimizer keeps in host memory beside its planes, to be saved: as when parameters had been updated
        so many times (by id()), now or one update ago. Empty but for Adafactor."""
        return {} if self.adafactor is None else {"adafactor": self.adafactor.state(steps)}

    def steps_of(self, parameter: torch.nn.Parameter) -> int:
        """Updates that one parameter has had."""
        return self._steps.get(parameter, 0)

    def set_steps_of(self, parameter: torch.nn.Parameter, steps: int) -> None:
        """As a checkpoint, or the step before one that is discarded, had it."""
        self._steps[parameter] = steps

    def all_steps(self) -> dict[int, int]:
        """Updates of every parameter so far, by its id()."""
        return {id(parameter): steps for parameter, steps in self._steps.items()}

    def roll_back(self, steps: dict[int, int]) -> None:
        """Undo the counting since `all_steps`, and one update's statistics."""
        self._steps = {p: steps[id(p)] for p in self._steps if id(p) in steps}
        if self.adafactor is not None:
            self.adafactor.roll_back(steps)

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Everything in the groups but the parameters."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]

    def set_hyperparameters(self, groups: list[dict[str, Any]], where: str) -> None:
        """Undo changes since `hyperparameters`. Raises CheckpointError for another number of groups."""
        if len(groups) != len(self.param_groups):
            raise CheckpointError(
                f"{where}: has {len(groups)} parameter groups, this optimizer has {len(self.param_groups)}: "
                "make the optimizer as it was made for the run that was saved"
            )
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make (or confirm) the update of every parameter that has a gradient. Returns the closure's loss."""
        loss = loss_of(closure)
        for group in self.param_groups:
            used = self._used.get(id(group))
            if used is not None and used != self._recognised.values(group):
                raise UsageError(
                    "hyperparameters were changed between backward and optimizer.step(), but updates ran during "
                    "backward: change them after step(), or use update='deferred'"
                )
        self._used.clear()
        if self.engine is None:
            raise UsageError("this optimizer is not attached to a model; get it from offload.wrap")
        self.engine.check_step()
        self._refuse_regrouped()
        self._tell_of_gradients_left()
        taken_gradients.refuse_by_hand(self._group_of)
        self.engine.optimizer_step()
        self.steps_made += 1
        self._used.clear()
        return loss

    def _refuse_regrouped(self) -> None:
        """Raise UsageError where parameters are in other groups than updates know of."""
        present = {parameter: group for group in self.param_groups for parameter in group["params"]}
        if len(present) != len(self._group_of) or any(
            present.get(parameter) is not group for parameter, group in self._group_of.items()
        ):
            raise UsageError(
                "parameters were put into, taken out of or moved between groups by hand, and updates of this step "
                "may have been made with the groups of before: add parameters with add_param_group, leave one out by "
                "requires_grad_(False), and change hyperparameters in the groups that there are"
            )

    def _tell_of_gradients_left(self) -> None:
        """Say once where torch would use the gradients of the step before again."""
        left, self._last_step.has_left_gradients = self._last_step.has_left_gradients, True
        emptied, self._n_emptied = self._n_emptied, taken_gradients.n_emptied()
        if emptied != self._n_emptied:
            left = False
        if left and not self._has_told:
            self._has_told = True
            logger.warning(
                "optimizer.step() again without optimizer.zero_grad(): torch would add the gradients of the step "
                "before to those of this one, here a step uses each gradient once; call zero_grad() in every step"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard gradients that no step has consumed; with `set_to_none` or without, `.grad` is None then."""
        self._last_step.has_left_gradients = False
        if not set_to_none:
            _tell_of_zeros()
        taken_gradients.give_back(self._group_of)
        super().zero_grad()
        if self.engine is not None:
            self.engine.discard_gradients()


@functools.cache
def _tell_of_zeros() -> None:
    logger.warning(
        "zero_grad(set_to_none=False) does what zero_grad() does: gradients are not kept in .grad, so that none is set "
        "to zero. A parameter that gets no gradient in a step is left as it is, where torch would update it with zeros "
        "(momentum and weight decay go on there)"
    )

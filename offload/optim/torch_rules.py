"""The update rules in torch's operations, bit for bit what the extension's kernels compute (csrc/optim/rules_body.h).

Every operation rounds once, in the order of the kernels: none that torch may fuse (lerp, addcmul, add with alpha) is
used, and a divisor is a tensor, because torch multiplies by the reciprocal of a number. Results are canonical: torch's
NaN has another payload on every device, and the low half of some would round to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from offload.transfer.io_engine import Hyper

HALF = 0x8000
"""Of the last bit of a bf16 value, in those of fp32."""


@dataclass(frozen=True)
class Views:
    """What one update works on: tensors of one shape on the device, the parameters (`param`, and of split masters `lo`,
    int16), `grad` and fp32 `moments`. `scratch` is three fp32 tensors of that shape, `divisor` one of no dimension."""

    param: torch.Tensor
    lo: torch.Tensor | None
    grad: torch.Tensor
    moments: tuple[torch.Tensor, ...]
    scratch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    divisor: torch.Tensor


def _single(value: float) -> float:
    """Rounded to fp32, as the kernels' scalars are."""
    return float(np.float32(value))


def _canonical(values: torch.Tensor) -> torch.Tensor:
    return values.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)


def _master(views: Views) -> torch.Tensor:
    """The fp32 masters, in the first scratch."""
    master = views.scratch[0]
    if views.lo is None:
        return master.copy_(views.param)
    bits = master.view(torch.int32)
    bits.copy_(views.param.view(torch.int16))
    bits.bitwise_left_shift_(16).add_(views.lo)
    return master


def _store(views: Views, master: torch.Tensor) -> None:
    _canonical(master)
    if views.lo is None:
        views.param.copy_(master)
        return
    bits, rounded = master.view(torch.int32), views.scratch[1].view(torch.int32)
    torch.add(bits, HALF, out=rounded)
    rounded.bitwise_right_shift_(16)
    views.param.view(torch.int16).copy_(rounded)
    views.lo.copy_(bits)


def _grad_scale(hyper: Hyper) -> float:
    return _single(-hyper.grad_scale if hyper.maximize else hyper.grad_scale)


def _gradient(views: Views, scale: float) -> torch.Tensor:
    """Scaled, in the second scratch."""
    grad = views.scratch[1].copy_(views.grad)
    return grad if scale == 1.0 else grad.mul_(scale)


def _add_l2(views: Views, l2: float, grad: torch.Tensor, master: torch.Tensor) -> None:
    if l2:
        grad.add_(torch.mul(master, l2, out=views.scratch[2]))


@dataclass(frozen=True)
class AdamWScalars:
    """What an AdamW or Adam step computes with besides the planes, rounded to fp32: `scalars_of` in csrc/optim."""

    grad_scale: float
    l2: float
    decay: float
    lerp_weight: float
    lerp_from_grad: bool
    beta2: float
    one_minus_beta2: float
    bias_correction2_sqrt: float
    eps: float
    negative_step_size: float


def adamw_scalars(hyper: Hyper) -> AdamWScalars:
    """Of a parameter's hyperparameters."""
    weight = _single(1.0 - hyper.beta1)
    from_grad = weight >= 0.5
    return AdamWScalars(
        grad_scale=_grad_scale(hyper),
        l2=0.0 if hyper.decoupled else _single(hyper.weight_decay),
        decay=_single(1.0 - hyper.lr * hyper.weight_decay) if hyper.decoupled else 1.0,
        lerp_weight=_single(weight - 1.0) if from_grad else weight,
        lerp_from_grad=from_grad,
        beta2=_single(hyper.beta2),
        one_minus_beta2=_single(1.0 - hyper.beta2),
        bias_correction2_sqrt=_single(math.sqrt(1.0 - hyper.beta2**hyper.step)),
        eps=_single(hyper.eps),
        negative_step_size=_single(-hyper.lr / (1.0 - hyper.beta1**hyper.step)),
    )


def _adamw(views: Views, hyper: Hyper) -> None:
    scalars = adamw_scalars(hyper)
    master, grad, temporary = _master(views), _gradient(views, scalars.grad_scale), views.scratch[2]
    exp_avg, exp_avg_sq = views.moments
    _add_l2(views, scalars.l2, grad, master)
    master.mul_(scalars.decay)
    torch.sub(grad, exp_avg, out=temporary)
    if scalars.lerp_from_grad:
        exp_avg.copy_(grad)
    exp_avg.add_(temporary.mul_(scalars.lerp_weight))
    exp_avg_sq.mul_(scalars.beta2)
    exp_avg_sq.add_(torch.mul(grad, scalars.one_minus_beta2, out=temporary).mul_(grad))
    views.divisor.fill_(scalars.bias_correction2_sqrt)
    _square_root(exp_avg_sq, temporary).div_(views.divisor).add_(scalars.eps)
    torch.mul(exp_avg, scalars.negative_step_size, out=grad)
    master.add_(grad.div_(temporary))
    _canonical(exp_avg)
    _canonical(exp_avg_sq)
    _store(views, master)


def _square_root(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, which torch's on the CPU is not in fp32."""
    if values.device.type == "cpu":
        return target.copy_(values.double().sqrt_())
    return torch.sqrt(values, out=target)


def _sgd(views: Views, hyper: Hyper) -> None:
    master, grad, temporary = _master(views), _gradient(views, _grad_scale(hyper)), views.scratch[2]
    _add_l2(views, _single(hyper.weight_decay), grad, master)
    if hyper.momentum:
        (buffer,), momentum = views.moments, _single(hyper.momentum)
        if hyper.step == 1:
            buffer.copy_(grad)
        else:
            buffer.mul_(momentum)
            buffer.add_(torch.mul(grad, _single(1.0 - hyper.dampening), out=temporary))
        if hyper.nesterov:
            grad.add_(torch.mul(buffer, momentum, out=temporary))
        else:
            grad.copy_(buffer)
        _canonical(buffer)
    master.add_(grad.mul_(_single(-hyper.lr)))
    _store(views, master)


def _lion(views: Views, hyper: Hyper) -> None:
    grad, temporary = _gradient(views, _grad_scale(hyper)), views.scratch[2]
    (exp_avg,) = views.moments
    torch.mul(exp_avg, _single(hyper.beta1), out=temporary)
    temporary.add_(torch.mul(grad, _single(1.0 - hyper.beta1), out=views.scratch[0]))
    exp_avg.mul_(_single(hyper.beta2)).add_(grad.mul_(_single(1.0 - hyper.beta2)))
    _canonical(exp_avg)
    sign, master = _sign(temporary, grad), _master(views)
    master.mul_(_single(1.0 - hyper.lr * hyper.weight_decay)).add_(sign.mul_(_single(-hyper.lr)))
    _store(views, master)


def _sign(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Zeros keep their sign, and NaN is NaN, which torch's is not. Changes `values`; takes no memory."""
    target.copy_(values).nan_to_num_(nan=0.0, posinf=1.0, neginf=-1.0).sign_()
    torch.copysign(target, values, out=target)
    return target.add_(values.clamp_(-1.0, 1.0).mul_(0.0))


UPDATES: dict[str, Callable[[Views, Hyper], None]] = {"adamw": _adamw, "sgd": _sgd, "lion": _lion}
"""By rule, for fp32 moments (`UpdateRule.made_on_device`): one step of the elements in the views."""

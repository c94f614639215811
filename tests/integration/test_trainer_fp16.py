"""OffloadTrainer in fp16: autocast with the loss scaled, and steps whose gradients overflow are not made."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from offload.transformers import OffloadTrainer
from tests.integration.test_trainer import assert_close, curve, make

pytest.importorskip("accelerate")
SCALE = 2.0**16


class ByHand(Trainer):
    """fp16 written out: autocast, the loss times a fixed scale, gradients divided by it before they are clipped."""

    def compute_loss(self, model, inputs, return_outputs=False, **more):
        with torch.autocast("cpu", torch.float16, enabled=torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, **more)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        backward = self.accelerator.backward
        self.accelerator.backward = lambda loss, **more: backward(loss * SCALE, **more)

    def _unscale(self, model):
        for parameter in model.parameters():
            parameter.grad /= SCALE

    def _clip_grad_norm(self, model):
        self._unscale(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            self._unscale(model)
        return super()._get_grad_norm(model, grad_norm)


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"max_grad_norm": 0.0}, marks=pytest.mark.slow)], ids=str
)
def test_the_curve_is_that_of_fp16_written_out_in_memory(tmp_path, changes):
    plain = make(ByHand, tmp_path / "plain", **changes)
    plain.train()
    streamed = make(OffloadTrainer, tmp_path / "run", fp16=True, **changes)
    streamed.train()
    assert streamed.loss_scale.scale == SCALE
    assert streamed.args.mixed_precision == "fp16"
    streamed.close()
    assert_close(curve(streamed, "loss"), curve(plain, "loss"), 2e-3)  # fp16 rounds a few gradients elsewhere
    assert_close(curve(streamed, "grad_norm"), curve(plain, "grad_norm"), 2e-2)
    fp32 = make(Trainer, tmp_path / "fp32", **changes)
    fp32.train()
    assert curve(fp32, "loss") != curve(plain, "loss"), "fp16 changed nothing"


@pytest.mark.slow
def test_steps_that_overflow_change_nothing_and_the_schedule_waits(tmp_path):
    """From a scale of 2^36 down, a halving for every step whose gradients are not finite."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **_):
            weight = next(dict(block)["lm_head.weight"].clone() for block in model.offload.iter_blocks())
            seen.append((weight, lr_scheduler.last_epoch, trainer.loss_scale.scale))

    trainer = make(OffloadTrainer, tmp_path, fp16=True, max_steps=30)
    trainer.loss_scale.scale = 2.0**36
    trainer.add_callback(Watch())
    trainer.train()
    trainer.close()
    epochs = [0, *(last_epoch for _, last_epoch, _ in seen)]
    skipped = [after == before for before, after in itertools.pairwise(epochs)]
    assert skipped[:2] == [True, True]
    assert skipped.count(False) > 5
    for number, (weight, _, scale) in enumerate(seen):
        assert scale == 2.0 ** (36 - sum(skipped[: number + 1]))
        if number and skipped[number]:
            assert torch.equal(weight, seen[number - 1][0])
    assert not torch.equal(seen[-1][0], seen[0][0])
    norms = [norm for _, _, norm in curve(trainer, "grad_norm")]
    assert [not math.isfinite(norm) for norm in norms] == skipped


def test_a_resumed_run_goes_on_with_the_loss_scale_it_had(tmp_path):
    whole = make(
        OffloadTrainer, tmp_path / "run", fp16=True, max_steps=4, save_strategy="steps", save_steps=2
    )
    whole.loss_scale.scale = 2.0**9
    whole.train()
    whole.close()
    resumed = make(OffloadTrainer, tmp_path / "run", fp16=True, max_steps=4)
    assert resumed.loss_scale.scale == SCALE
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    resumed.close()
    assert resumed.loss_scale.scale == 2.0**9
    assert curve(resumed) == curve(whole)

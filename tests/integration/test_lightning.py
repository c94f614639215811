"""Lightning's Trainer fits a wrapped model as it fits one in memory; what it cannot do is refused with the remedy."""

from __future__ import annotations

import contextlib

import pytest
import torch

import offload
from offload.errors import UsageError
from tests.conftest import batches, build

lightning = pytest.importorskip("lightning")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

ROWS = [row for batch in batches(8) for row in batch]


class Fitted(lightning.LightningModule):
    """The model is a part of the module that is fitted, as it is in a user's."""

    def __init__(self, directory=None, **settings):
        super().__init__()
        self.model = build("llama")
        self.made = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.losses = []
        if directory is not None:
            sizes = {"device_memory": "1200KB", "host_memory": "1600KB", "chunk_elements": 4096}
            self.model, self.made = offload.wrap(
                self.model,
                self.made,
                storage=[str(directory)],
                **{**sizes, "step_aside": "never", **settings},
            )

    def training_step(self, batch, _):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.losses.append(self.model(input_ids=batch, labels=batch).loss.item())

    def configure_optimizers(self):
        schedule = torch.optim.lr_scheduler.LambdaLR(self.made, lambda step: 1 / (1 + step))
        return {"optimizer": self.made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Holding(Fitted):
    """Says which backwards another one follows: updates run during the last."""

    def backward(self, loss, *args, **kwargs):
        engine = getattr(self.model, "offload", None)
        another = (self.trainer.fit_loop.batch_idx + 1) % self.trainer.accumulate_grad_batches != 0
        with engine.no_sync() if engine is not None and another else contextlib.nullcontext():
            loss.backward(*args, **kwargs)


class Manual(Fitted):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, _))
        optimizer.step()
        self.lr_schedulers().step()


def fit(module, directory, **settings):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=directory, **{"max_epochs": 1, "enable_checkpointing": False, **settings},
    )  # fmt: skip
    data = torch.utils.data.DataLoader(ROWS, batch_size=4)
    trainer.fit(module, data, torch.utils.data.DataLoader(ROWS[:8], batch_size=4))
    return module, trainer


CASES = {
    "automatic": (Fitted, {}, {}, {}),
    "validated in between": (Fitted, {"val_check_interval": 2}, {}, {}),
    "clipped by the engine": (Fitted, {}, {"gradient_clip_val": 1.0}, {"max_grad_norm": 1.0}),
    "accumulated, updates wait": (Fitted, {"accumulate_grad_batches": 2}, {}, {"update": "deferred"}),
    "accumulated and clipped": (
        Fitted,
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 1.0},
        {"max_grad_norm": 1.0},
    ),
    "accumulated, updates in backward": (Holding, {"accumulate_grad_batches": 2}, {}, {}),
    "manual": (Manual, {}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_has_the_losses_it_has_in_memory(tmp_path, case, caplog):
    kind, settings, in_memory, streamed = CASES[case]
    plain, _ = fit(kind(), tmp_path, **settings, **in_memory)
    module, _ = fit(kind(tmp_path / "store", **streamed), tmp_path, **settings)
    assert len(plain.losses) >= 12
    assert module.losses == pytest.approx(plain.losses, abs=5e-6)
    assert "zero_grad" not in caplog.text
    assert module.model.offload.counters()["read_bytes"] > 0
    module.model.offload.close()


def test_mixed_precision_has_the_bits_of_a_run_that_streams_nothing(tmp_path):
    losses = []
    for more in ({"step_aside": "always", "device_memory": "20MB"}, {}):
        module, _ = fit(Fitted(tmp_path / str(len(losses)), **more), tmp_path, precision="bf16-mixed")
        losses.append(module.losses)
        module.model.offload.close()
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"gradient_clip_val": 1.0}, "max_grad_norm"),
        ({"accumulate_grad_batches": 2}, r"no_sync.*update='deferred'"),
        ({"precision": "bf16-true"}, r"before offload\.wrap"),
        ({"callbacks": lightning.pytorch.callbacks.StochasticWeightAveraging(1e-3, 1)}, r"state_dict\(\)"),
        ({"callbacks": lightning.pytorch.callbacks.EMAWeightAveraging()}, r"state_dict\(\)"),
    ],
    ids=lambda value: str(*value) if isinstance(value, dict) else "",
)
def test_what_the_trainer_would_do_to_gradients_and_parameters_is_refused_with_the_remedy(
    tmp_path, settings, remedy
):
    module = Fitted(tmp_path / "store")
    with pytest.raises(UsageError, match=remedy):
        fit(module, tmp_path, **{"max_epochs": 3, **settings})
    module.model.offload.close()


def test_a_checkpoint_of_the_trainer_holds_the_weights_and_cannot_be_resumed_from(tmp_path):
    module, trainer = fit(Fitted(tmp_path / "store"), tmp_path, enable_checkpointing=True)
    path = trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=False)["state_dict"]
    expected = module.model.state_dict()
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in expected.items())
    module.model.offload.close()
    again = Fitted(tmp_path / "again")
    with pytest.raises(UsageError, match=r"offload\.save with offload\.resume"):
        trainer.fit(
            again, torch.utils.data.DataLoader(ROWS, batch_size=4), ckpt_path=path, weights_only=False
        )
    again.model.offload.close()

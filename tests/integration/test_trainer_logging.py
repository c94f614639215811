"""TensorBoard and Weights & Biases, where they are installed, get the curve of a streamed run."""

from __future__ import annotations

import pytest

from offload.transformers import OffloadTrainer
from tests.integration.test_trainer import curve, make

pytestmark = pytest.mark.slow
pytest.importorskip("accelerate")
LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")


def run(directory, where):
    """What the Trainer says it has logged: {(step, key): value}, evaluations included."""
    trainer = make(
        OffloadTrainer, directory, report_to=[where], max_steps=4, eval_strategy="steps", eval_steps=2, run_name="small"
    )  # fmt: skip
    trainer.train()
    trainer.close()
    expected = {(step, key): value for step, key, value in curve(trainer, *LOGGED)}
    assert len(expected) == 3 * 4 + 2
    return expected


def named(key):
    """As the callbacks of transformers name it."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def test_tensorboard_gets_the_curve(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    expected = run(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for key in LOGGED:
        found = [(event.step, event.value) for event in events.Scalars(named(key))]
        wanted = [(step, value) for (step, name), value in expected.items() if name == key]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)


def test_wandb_offline_gets_the_curve(tmp_path, monkeypatch):
    """What the Trainer hands to wandb, which writes an offline run at the same time."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {
        "MODE": "offline",
        "DIR": str(tmp_path),
        "PROJECT": "offload",
        "SILENT": "true",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    found, log = {}, wandb.Run.log

    def listen(self, row, *args, **more):
        found.update(
            {(row["train/global_step"], key): row[named(key)] for key in LOGGED if named(key) in row}
        )
        return log(self, row, *args, **more)

    monkeypatch.setattr(wandb.Run, "log", listen)
    expected = run(tmp_path / "run", "wandb")
    wandb.finish()
    assert found == expected
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1

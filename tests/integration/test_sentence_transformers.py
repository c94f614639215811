"""The trainer of sentence-transformers, with `OffloadMixin` before it: its curve, and directories of its own kind."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import bert
from tests.integration.test_trainer import assert_close, curve
from tests.integration.test_trl import tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

from sentence_transformers import losses  # noqa: E402

from offload.transformers import OffloadMixin  # noqa: E402

pytestmark = pytest.mark.slow

ROWS = [{"anchor": f"say {i}", "positive": f"tell {i}"} for i in range(24)]


class Streamed(OffloadMixin, sentence_transformers.SentenceTransformerTrainer):
    pass


def embedding_model(directory):
    from sentence_transformers.models import Pooling, Transformer

    torch.manual_seed(0)
    bert().bert.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    inner = Transformer(str(directory))
    return sentence_transformers.SentenceTransformer(modules=[inner, Pooling(64)], device="cpu")


def in_mini_batches(model):
    """Whose gradients are computed part by part, in a backward hook."""
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


@pytest.mark.parametrize("loss_of", [losses.MultipleNegativesRankingLoss, in_mini_batches])
def test_the_curve_is_that_of_the_trainer_and_the_directory_is_what_it_reads(tmp_path, loss_of):
    curves = []
    for kind in (sentence_transformers.SentenceTransformerTrainer, Streamed):
        model = embedding_model(tmp_path / "bert")
        settings = {
            "storage": [str(tmp_path)],
            "device_memory": "20MB",
            "host_memory": "2MB",
            "step_aside": "never",
        }
        extra = {"offload": {**settings, "chunk_elements": 4096}} if kind is Streamed else {}
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, logging_steps=1,
            report_to=[], use_cpu=True, learning_rate=1e-3, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = kind(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(ROWS), loss=loss_of(model), **extra
        )  # fmt: skip
        trainer.train()
        curves.append(curve(trainer, "loss"))
    assert len(curves[0]) == 4
    assert_close(curves[1], curves[0])
    assert model.offload.counters()["read_bytes"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    expected, again = model.state_dict(), sentence_transformers.SentenceTransformer(str(tmp_path / "saved"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert (tmp_path / "saved" / "modules.json").exists()
    trainer.close()

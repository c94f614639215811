"""OffloadTrainer does what Trainer does: the same curve, events, files and generation, and goes on after a kill."""

from __future__ import annotations

import json
import logging
import signal

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

import offload
from offload.errors import CheckpointError, ConfigError
from offload.transformers import OffloadMixin, OffloadSeq2SeqTrainer, OffloadTrainer, load_model
from tests import child
from tests.conftest import Around
from tests.families import FAMILIES, VOCAB

LOSS_BOUND = 5e-6
"""Of losses beside plain torch, in nats; see test_model_families.py."""


def dataset(n=40, length=12, seed=5):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCAB, (length,), generator=generator) for _ in range(n)]
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(directory, kind=TrainingArguments, **changes):
    settings = {
        "output_dir": str(directory), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "logging_steps": 1,
        "save_strategy": "no", "seed": 3, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return kind(**{**settings, **changes})


def settings_in(directory, **changes):
    small = {"step_aside": "never", "device_memory": "20MB", "host_memory": "4MB", "chunk_elements": 4096}
    return {**small, "storage": [str(directory / "store")], **changes}


def make(kind, directory, name="Llama", offload_settings=None, model=None, more=None, **changes):
    extra = dict(more or {})
    if issubclass(kind, OffloadTrainer):
        extra.setdefault("offload", settings_in(directory, **(offload_settings or {})))
    return kind(
        model=model if model is not None else FAMILIES[name].build(), args=arguments(directory, **changes),
        train_dataset=dataset(), eval_dataset=dataset(4, seed=6), **extra,
    )  # fmt: skip


def curve(trainer, *keys):
    keys = keys or ("loss", "eval_loss")
    return [
        (entry["step"], key, entry[key])
        for entry in trainer.state.log_history
        for key in keys
        if key in entry
    ]


def assert_close(got, expected, bound=LOSS_BOUND):
    assert [point[:2] for point in got] == [point[:2] for point in expected]
    assert max(abs(a[2] - b[2]) for a, b in zip(got, expected, strict=True)) <= bound


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 3}], ids=str)
def test_the_curve_is_that_of_the_trainer(tmp_path, changes):
    """Accumulation, clipping (the default) and none, warmup, decay, evaluation; the norm is the one before clipping."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, **changes}
    plain, streamed = (
        make(kind, tmp_path / kind.__name__, **evaluation) for kind in (Trainer, OffloadTrainer)
    )
    plain.train()
    streamed.train()
    streamed.close()
    assert_close(curve(streamed), curve(plain))
    assert curve(streamed, "learning_rate") == curve(plain, "learning_rate")
    if changes.get("max_grad_norm", 1.0):
        norms = curve(plain, "grad_norm")
        assert max(norm for _, _, norm in norms) > 1.0, "nothing was clipped"
        assert_close(curve(streamed, "grad_norm"), norms, 1e-4)


CHILD = """
import os, pathlib, signal, sys
from tests.integration.test_trainer import OffloadTrainer, TrainerCallback, make

class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make(OffloadTrainer, pathlib.Path(sys.argv[1]), save_strategy="steps", save_steps=2, max_steps=7)
trainer.add_callback(Killer())
trainer.train()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_has_the_curve_it_would_have_had(tmp_path):
    """Killed in step 5, resumed from the checkpoint of step 4: bit for bit, the shuffling of the data included."""
    whole = make(OffloadTrainer, tmp_path / "whole", max_steps=7)
    whole.train()
    whole.close()
    status, _, err = child.run(CHILD, tmp_path / "run", timeout_s=90)
    assert status == -signal.SIGKILL, err
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    resumed = make(OffloadTrainer, tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=7)
    resumed.train(resume_from_checkpoint=True)
    resumed.close()
    assert curve(resumed) == curve(whole)
    first = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in first] == [1, 2, 3, 4]


class OwnFiles(Trainer):
    """A trainer of another library, whose models have directories of their own kind."""

    def _save(self, output_dir=None, state_dict=None):
        torch.save(self.model.state_dict(), f"{output_dir}/own.pt")


@pytest.mark.parametrize("around", [False, True])
def test_a_trainer_keeps_its_own_directories_for_models_that_are_not_of_transformers(tmp_path, around):
    model = FAMILIES["Llama"].build()
    kind = type("Streamed", (OffloadMixin, OwnFiles), {})
    trainer = kind(
        model=Around(model) if around else model, train_dataset=dataset(),
        args=arguments(tmp_path, max_steps=1, remove_unused_columns=False),
        offload=settings_in(tmp_path),
    )  # fmt: skip
    trainer.train()
    (tmp_path / "out").mkdir()
    trainer.save_model(str(tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("own.pt" in written, "model.safetensors" in written) == (around, not around)
    trainer.close()


def test_files_of_a_run_are_ready_for_from_pretrained_and_the_hub(tmp_path, monkeypatch):
    from tests.integration.command_line import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make(OffloadTrainer, tmp_path, more={"processing_class": tokenizer})
    trainer.train()
    batch = {"input_ids": dataset(2)[0]["input_ids"][None]}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
    trainer.save_model()
    trainer.save_model()  # in place of the first
    pushed = {}

    class Api:
        def upload_folder(self, **what):
            pushed.update(what, files=sorted(p.name for p in tmp_path.iterdir() if p.is_file()))

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    trainer.hub_model_id = "someone/something"
    trainer.push_to_hub()
    trainer.close()
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    } <= set(pushed["files"])
    assert not [name for name in pushed["files"] if name.startswith(".")]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again.eval()(**batch).logits, expected)
    transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_generation_during_training_is_that_of_the_model_in_memory(tmp_path):
    """Every step, with a cache, by streaming: the tokens that the same model in memory generates."""
    prompt = torch.arange(6)[None]

    class Generate(TrainerCallback):
        def __init__(self):
            self.tokens = []

        def on_step_end(self, args, state, control, model=None, **_):
            tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
            self.tokens.append(tokens[0].tolist())

    seen = {}
    for kind in (Trainer, OffloadTrainer):
        callback = Generate()
        trainer = make(kind, tmp_path / kind.__name__, max_steps=3)
        trainer.add_callback(callback)
        trainer.train()
        seen[kind] = callback.tokens, curve(trainer)
    trainer.close()
    assert seen[OffloadTrainer][0] == seen[Trainer][0]
    assert all(len(tokens) == 14 for tokens in seen[Trainer][0])
    assert_close(seen[OffloadTrainer][1], seen[Trainer][1])


def test_seq2seq_evaluation_generates_by_streaming(tmp_path):
    results = []
    for kind in (transformers.Seq2SeqTrainer, OffloadSeq2SeqTrainer):
        args = arguments(
            tmp_path, transformers.Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=6,
            max_steps=2,
        )  # fmt: skip
        extra = {} if kind is transformers.Seq2SeqTrainer else {"offload": settings_in(tmp_path)}
        trainer = kind(
            model=FAMILIES["T5"].build(), args=args, train_dataset=dataset(), eval_dataset=dataset(4), **extra
        )
        trainer.train()
        results.append(trainer.predict(dataset(4, seed=7)).predictions.tolist())
    trainer.close()
    assert results[0] == results[1]


def test_the_best_model_comes_back_at_the_end(tmp_path):
    """The loss of an evaluation after training is the best one's, not the last one's."""
    trainer = make(
        OffloadTrainer, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, max_steps=5,
        save_strategy="steps", save_steps=1, learning_rate=0.3, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    trainer.train()
    losses = [loss for _, _, loss in curve(trainer, "eval_loss")]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == min(losses)
    trainer.close()


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_that_would_cast_the_model_computes_as_training_does(tmp_path, option, caplog):
    """Before and after training the Trainer itself would leave a model of 16 bits behind."""
    plain = make(Trainer, tmp_path / "plain", max_steps=2)
    with caplog.at_level(logging.INFO, "offload"):
        streamed = make(OffloadTrainer, tmp_path / "streamed", max_steps=2, **{option: True})
    assert f"{option} is off" in caplog.text
    for trainer in (plain, streamed):
        trainer.evaluate()
        trainer.train()
        trainer.evaluate()
    streamed.close()
    assert_close(curve(streamed), curve(plain))


def test_callbacks_hear_the_same_events(tmp_path):
    class Listen(TrainerCallback):
        def __init__(self):
            self.heard = []

        def __getattribute__(self, name):
            if name.startswith("on_"):
                self.heard.append(name)
            return super().__getattribute__(name)

    heard = []
    for kind in (Trainer, OffloadTrainer):
        listener = Listen()
        trainer = make(kind, tmp_path / kind.__name__, save_strategy="steps", save_steps=2, max_steps=3)
        trainer.add_callback(listener)
        trainer.train()
        heard.append(listener.heard)
    trainer.close()
    assert heard[0] == heard[1]
    assert heard[0].count("on_step_end") == 3
    assert heard[0].count("on_save") == 2


def test_an_optimizer_and_a_scheduler_of_the_users_own_are_used(tmp_path):
    curves = []
    for kind in (Trainer, OffloadTrainer):
        model = FAMILIES["Llama"].build()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, betas=(0.5, 0.9))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.3)
        own = {"optimizers": (optimizer, scheduler)}
        trainer = make(kind, tmp_path / kind.__name__, model=model, more=own)
        trainer.train()
        curves.append((curve(trainer), curve(trainer, "learning_rate")))
    trainer.close()
    assert_close(curves[1][0], curves[0][0])
    assert curves[1][1] == curves[0][1]
    assert len({rate for _, _, rate in curves[0][1]}) == 3


class OwnGroups(Trainer):
    """As scripts have it that were written when `create_optimizer` took no model."""

    def create_optimizer(self):
        if self.optimizer is None:
            named = list(self.model.named_parameters())
            head = {"params": [p for n, p in named if "lm_head" in n], "lr": 3e-2, "weight_decay": 0.0}
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind([{"params": [p for n, p in named if "lm_head" not in n]}, head], **settings)
        return super().create_optimizer()


class OffloadOwnGroups(OffloadMixin, OwnGroups):
    pass


def test_a_subclass_whose_create_optimizer_takes_no_model_keeps_its_groups(tmp_path):
    curves = []
    for kind, more in ((OwnGroups, {}), (OffloadOwnGroups, {"offload": settings_in(tmp_path)})):
        trainer = make(kind, tmp_path / kind.__name__, more=more)
        trainer.train()
        curves.append(curve(trainer))
        assert [len(group["params"]) > 1 for group in trainer.optimizer.param_groups] == [True, False]
    trainer.close()
    assert_close(curves[1], curves[0])


def test_what_the_refusal_of_adafactor_names_trains_as_in_memory(tmp_path):
    curves = []
    for kind in (Trainer, OffloadTrainer):
        own = {"optimizer_cls_and_kwargs": (torch.optim.Adafactor, {"lr": 1e-2})}
        trainer = make(kind, tmp_path / kind.__name__, more=own)
        trainer.train()
        curves.append(curve(trainer))
    trainer.close()
    assert_close(curves[1], curves[0])


def test_a_directory_is_trained_without_being_in_memory_and_bf16_autocast_is_kept(tmp_path):
    """`load_model` gives a model whose parameters are in its files until the engine moves them."""
    FAMILIES["Llama"].build().save_pretrained(tmp_path / "model")
    plain = make(Trainer, tmp_path / "plain", bf16=True)
    plain.train()
    model = load_model(str(tmp_path / "model"), "float32")
    streamed = make(OffloadTrainer, tmp_path / "run", model=model, bf16=True)
    before = streamed.evaluate()["eval_loss"]  # before training, by streaming as well
    assert abs(before - 4.57) < 0.05
    streamed.train()
    streamed.close()
    assert_close(
        curve(streamed, "loss"), curve(plain, "loss"), 2e-3
    )  # rounding to bf16, in another order in the head


def test_what_cannot_be_kept_is_refused_with_its_remedy(tmp_path):
    for changes, message in [
        ({"torch_compile": True}, "compile_blocks"),
        ({"auto_find_batch_size": True}, "micro_batches"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make(OffloadTrainer, tmp_path, **changes)
    with pytest.raises(ConfigError, match="TrainingArguments"):
        make(OffloadTrainer, tmp_path, offload_settings={"max_grad_norm": 1.0})
    with pytest.raises(ConfigError, match=r"as a dict, such as offload="):
        make(OffloadTrainer, tmp_path, more={"offload": "/mnt/nvme0"})
    with pytest.raises(ConfigError, match=r"optimizer_cls_and_kwargs=\(torch\.optim\.Adafactor"):
        make(OffloadTrainer, tmp_path, optim="adafactor").train()
    with pytest.raises(CheckpointError, match="no such directory"):
        make(OffloadTrainer, tmp_path).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    make(Trainer, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(CheckpointError, match="was not saved by OffloadTrainer"):
        make(OffloadTrainer, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("is_first", [False, True], ids=["schedule after wrap", "schedule before wrap"])
def test_a_loop_over_accelerate_accumulates_and_follows_its_scheduler(tmp_path, is_first):
    """As docs/huggingface.md has it; accelerate loads the optimizer's state into itself, which replaces its groups."""
    from accelerate import Accelerator

    def run(streamed):
        model = FAMILIES["Llama"].build()
        optimizer = given = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(given, 1, 0.5) if is_first else None
        if streamed:
            model, optimizer = offload.wrap(model, optimizer, max_grad_norm=0.5, **settings_in(tmp_path))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        loader = torch.utils.data.DataLoader(dataset(16), batch_size=2)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                waiting = streamed and not accelerator.sync_gradients
                with model.offload.no_sync() if waiting else torch.enable_grad():
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                if accelerator.sync_gradients and not streamed:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append((len(losses), "loss", loss.item()))
        if streamed:
            model.offload.close()
        return losses

    assert_close(run(True), run(False))


def test_a_checkpoint_of_the_same_name_holds_the_training_state_of_the_last_run_alone(tmp_path):
    """The Trainer writes over the other files of a checkpoint as well."""
    for learning_rate in (1e-2, 1e-3):
        changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": learning_rate}
        trainer = make(OffloadTrainer, tmp_path, **changes)
        trainer.train()
        trainer.close()
    state = tmp_path / "checkpoint-1" / "offload_state"
    assert len([path for path in state.iterdir() if path.name.startswith("step-")]) == 1

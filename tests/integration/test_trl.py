"""TRL's trainers, with `OffloadMixin` before them, have the curve they have in memory, and go on after a resume."""

from __future__ import annotations

import math

import pytest
import torch

import offload
from offload.errors import ConfigError
from tests.conftest import build, llama
from tests.integration.test_trainer import assert_close, curve

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from offload.transformers import OffloadMixin, load_model  # noqa: E402

pytestmark = pytest.mark.slow

GROUPED = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8}
"""Four answers to one question a step."""
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"say {i}"}],
        "chosen": [{"role": "assistant", "content": f"number {i * 7}"}],
        "rejected": [{"role": "assistant", "content": f"no {i}"}],
    }
    for i in range(24)
]
CHATS = [{"messages": pair["prompt"] + pair["chosen"]} for pair in PAIRS]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair["chosen"], "label": i % 2 == 0}
    for i, pair in enumerate(PAIRS)
]
QUESTIONS = [{"prompt": pair["prompt"]} for pair in PAIRS]


def tokenizer():
    """Of characters, with a template for conversations."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<pad>", "<end>", *map(chr, range(32, 127)), "\n"]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(letters)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    made.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>",
        chat_template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )  # fmt: skip


def of_one_score():
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = llama().config
    config.num_labels, config.pad_token_id = 1, 0
    return LlamaForSequenceClassification(config)


def judge(completions, **_):
    return [float(sum(map(ord, str(completion))) % 7) for completion in completions]


def sizes(directory):
    return {
        "storage": [str(directory / "store")], "device_memory": "1200KB", "host_memory": "1600KB",
        "step_aside": "never", "chunk_elements": 4096,
    }  # fmt: skip


def make(kind, directory, rows, *, streamed, model=None, more=None, **changes):
    """The trainer called `kind`, by itself or with the mixin before it, with what its Config takes as `changes`."""
    name = kind.removesuffix("Trainer")
    config = getattr(trl, f"{name}Config")(
        **{
            "output_dir": str(directory), "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
            "gradient_accumulation_steps": 2, "learning_rate": 2e-3, "report_to": [], "use_cpu": True,
            "bf16": False, "save_strategy": "no", "disable_tqdm": True, "seed": 3, **changes,
        }
    )  # fmt: skip
    trainer = getattr(trl, kind)
    extra = dict(more or {})
    if streamed:
        trainer = type(f"Streamed{kind}", (OffloadMixin, trainer), {})
        extra["offload"] = sizes(directory)
    torch.manual_seed(5)
    return trainer(
        model=build("llama") if model is None else model, args=config, processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows), **extra,
    )  # fmt: skip


def adapters():
    """With a base that host memory does not hold."""
    from peft import LoraConfig

    return {
        "model": build("llama", layers=12),
        "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4),
    }


CASES = {
    "answers alone": ("SFTTrainer", CHATS, {}, lambda: {}),
    "packed": ("SFTTrainer", CHATS, {"packing": True, "packing_strategy": "wrapped", "max_length": 32}, lambda: {}),
    "without clipping": ("SFTTrainer", CHATS, {"max_grad_norm": 0.0}, lambda: {}),
    "adapters": ("SFTTrainer", CHATS, {"learning_rate": 2e-2}, adapters),
    "preferences": ("DPOTrainer", PAIRS, {}, lambda: {"ref_model": build("llama")}),
    "preferences, reference computed before": ("DPOTrainer", PAIRS, {"precompute_ref_log_probs": True}, lambda: {}),
    "preferences of adapters": ("DPOTrainer", PAIRS, {"learning_rate": 2e-2}, adapters),
    "judgements": ("KTOTrainer", JUDGED, {}, lambda: {"ref_model": build("llama")}),
    "scores": ("RewardTrainer", PAIRS, {}, lambda: {"model": of_one_score()}),
    "own answers": ("GRPOTrainer", QUESTIONS, GROUPED, lambda: {"reward_funcs": judge}),
    "own answers, twice": (
        "GRPOTrainer",
        QUESTIONS,
        {**GROUPED, "num_iterations": 2},
        lambda: {"reward_funcs": judge},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_that_of_the_trainer(tmp_path, case):
    kind, rows, changes, extra = CASES[case]
    curves = []
    for streamed in (False, True):
        more = extra()
        model = more.pop("model", None)
        trainer = make(kind, tmp_path, rows, streamed=streamed, model=model, more=more, **changes)
        trainer.train()
        curves.append((curve(trainer, "loss"), curve(trainer, "grad_norm"), curve(trainer, "reward")))
        if streamed:
            assert trainer.model.offload.counters()["read_bytes"] > 0
            trainer.close()
    (losses, norms, rewards), (streamed_losses, streamed_norms, streamed_rewards) = curves
    assert len(losses) == 4
    assert_close(streamed_losses, losses)
    assert streamed_rewards == rewards
    if changes.get("max_grad_norm", 1.0):
        assert all(norm > 0 for _, _, norm in norms), "nothing was learned"
        for got, expected in zip(streamed_norms, norms, strict=True):
            assert math.isclose(got[2], expected[2], rel_tol=1e-3)


def test_what_saves_memory_in_memory_is_left_out(tmp_path):
    """TRL would put hooks around whole steps, and wrap layers in a checkpointing of its own."""
    curves = []
    for changes in (
        {},
        {"activation_offloading": True, "gradient_checkpointing_kwargs": {"selective": True}},
    ):
        trainer = make("SFTTrainer", tmp_path, CHATS, streamed=True, **changes)
        trainer.train()
        trainer.close()
        assert not trainer.args.gradient_checkpointing
        curves.append(curve(trainer, "loss"))
    assert curves[0] == curves[1]


def test_the_reference_of_a_preference_run_can_be_streamed_too(tmp_path):
    build("llama", layers=12).save_pretrained(tmp_path / "model")
    losses = []
    for streamed in (False, True):
        reference = build("llama", layers=12)
        if streamed:
            reference, _ = offload.load(tmp_path / "model", frozen=True, **sizes(tmp_path / "model"))
        trainer = make("DPOTrainer", tmp_path, PAIRS, streamed=streamed, more={"ref_model": reference})
        trainer.train()
        losses.append(curve(trainer, "loss"))
    assert_close(losses[1], losses[0])
    assert reference.offload.counters()["read_bytes"] > 0
    trainer.close()
    reference.offload.close()


def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")

    def run(directory, **resumed):
        trainer = make(
            "SFTTrainer", directory, CHATS, streamed=True, model=load_model(tmp_path / "model"),
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(**resumed)
        state = trainer.model.state_dict()
        trainer.save_model(directory / "final")
        trainer.close()
        return state, curve(trainer, "loss")

    expected, losses = run(tmp_path / "run")
    got, resumed_losses = run(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed_losses == losses
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("GRPOTrainer", {"use_vllm": True, **GROUPED}, "use_vllm"),
        ("GRPOTrainer", {"sync_ref_model": True, "beta": 0.1, **GROUPED}, "sync_ref_model"),
        ("DPOTrainer", {"sync_ref_model": True}, "sync_ref_model"),
    ],
)
def test_what_reads_parameters_by_itself_is_refused(tmp_path, kind, changes, said):
    """It would find NaN in place of those of blocks."""
    rows = QUESTIONS if kind == "GRPOTrainer" else PAIRS
    more = {"reward_funcs": judge} if kind == "GRPOTrainer" else {"ref_model": build("llama")}
    with pytest.raises(ConfigError, match=said):
        make(kind, tmp_path, rows, streamed=True, more=more, **changes)

"""The examples run as they stand, on a CPU, and learn; what they write loads again."""

from __future__ import annotations

import importlib
import pathlib
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.timeout(120)
"""What the documents promise of each, whatever time other tests are given."""

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Runs an example in this process; the store, the small model and the output are in a directory of the test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(name, *arguments):
        return importlib.import_module(name).main(
            ["--storage", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]
        )

    yield run
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def reloads(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model(**tokenizer("to be", return_tensors="pt"))


def test_the_loop_is_short_and_learns(example, tmp_path):
    assert len((EXAMPLES / "loop.py").read_text().splitlines()) < 100
    losses = example("loop", "--steps", "20")
    assert losses[-1] < losses[0] - 1
    reloads(tmp_path / "out")


def test_the_trainer_script_learns(example, tmp_path):
    losses = example("trainer", "--steps", "20")
    assert losses[-1] < losses[0] - 1
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-20"]
    reloads(tmp_path / "out")


@pytest.mark.slow
def test_the_accelerate_script_learns(example, tmp_path):
    losses = example("accelerate_loop", "--steps", "20")
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 1
    reloads(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), [("trl", "trl_sft"), ("lightning", "lightning_loop")])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_scripts_of_other_frameworks_learn(example, tmp_path, package, name):
    pytest.importorskip(package)
    losses = example(name, "--steps", "20")
    assert losses[-1] < losses[0] - 0.9
    reloads(tmp_path / "out")


@pytest.mark.slow
def test_the_lora_script_learns(example, tmp_path):
    losses = example("lora", "--steps", "20")
    assert losses[-1] < losses[0] - 0.2
    reloads(tmp_path / "out")
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_the_chat_script_learns_to_answer(example, tmp_path):
    answer = example("chat", "--steps", "150")
    assert answer.strip().startswith("0 plus 0 is")
    reloads(tmp_path / "out")


def test_packed_conversations_do_not_see_each_other(example, tmp_path, monkeypatch):
    """The summed loss of a packed row is that of its conversations one by one; questions are not learned."""
    import small_model

    from offload.transformers import pack_chats
    from offload.transformers.chat import IGNORED, tokens_of

    directory = small_model.write_small_model(str(tmp_path / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in [
            ("Who?", "Me."),
            ("And why is that so?", "Because."),
            ("Hm.", "Yes, indeed."),
        ]
    ]
    (row,) = pack_chats(chats, tokenizer, 160)
    assert tokenizer.decode(row["input_ids"][row["labels"] != IGNORED]) == "".join(
        answer + "<|end|>" for answer in ("Me.", "Because.", "Yes, indeed.")
    )

    def summed_loss(ids, labels, **more):
        logits = model(input_ids=ids[None], use_cache=False, **more).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")

    with torch.no_grad():
        packed = summed_loss(row["input_ids"], row["labels"], position_ids=row["position_ids"][None])
        single = sum(summed_loss(*map(torch.tensor, tokens_of(chat, tokenizer))) for chat in chats)
        mixed = summed_loss(row["input_ids"], row["labels"])
    torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-4)
    assert abs(mixed - single) > 1e-3, "without positions they do see each other"
    two = pack_chats(chats, tokenizer, 80)
    assert len(two) == 2
    assert all(len(tensor) == 80 for row in two for tensor in row.values())

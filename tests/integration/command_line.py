"""A text, a tokenizer for it, and `offload finetune` with small budgets, for tests of the command line."""

from __future__ import annotations

import pytest

from offload.cli import main
from tests.child import start
from tests.conftest import build

TEXT = "to be or not to be that is the question\n" * 60


def make_tokenizer():
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<end>", "<unknown>", *sorted(set(TEXT.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>"
    )


def make_workplace(place, layers=3):
    """A model directory with its tokenizer, and a text."""
    build("llama", layers=layers).save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


def finetune(place, *more):
    arguments = [
        "finetune", "--model", f"{place}/model", "--data", f"{place}/text.txt", "--storage", f"{place}/store",
        "--host-memory", "14900KB", "--device-memory", "12MB", "--step-aside", "never",
        "--steps", "4", "--batch-size", "2", "--sequence-length", "16", "--lr", "1e-2", *more,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code or 0


MAIN = """
import sys, torch
torch.set_num_threads(1)
from offload.cli import main
main(sys.argv[1:])
"""


def start_finetune(place, *more, script=MAIN):
    """The same in a process of its own, with memory enough, which prints JSON and can be signalled and killed."""
    return start(
        script, "finetune", "--model", place / "model", "--data", place / "text.txt", "--host-memory", "100MB",
        "--device-memory", "100MB", "--step-aside", "never", "--batch-size", 2, "--sequence-length", 16, "--json",
        *more,
    )  # fmt: skip

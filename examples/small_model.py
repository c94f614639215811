"""A small random Llama and a tokenizer of bytes, so that the examples run anywhere without fetching anything."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% if message.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_small_model(directory: str) -> str:
    """Write a directory as `save_pretrained` does: 0.4 M parameters, four layers."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["<|end|>", "<|padding|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|padding|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(directory)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(vocabulary), max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every example has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", help="a directory with safetensors; default: a small random model")
    made.add_argument("--text", default=str(Path(__file__).parents[1] / "README.md"), help="a text to learn")
    made.add_argument(
        "--storage", default=os.path.join(tempfile.gettempdir(), "offload-example"), help="a drive"
    )
    made.add_argument("--device-memory", default="6MB")
    made.add_argument("--host-memory", default="15MB")
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--out", help="where to write the trained model")
    return made


def budgets(args: argparse.Namespace) -> dict[str, object]:
    """What the library may use, as `offload.wrap`, `offload.load` and OffloadTrainer take it."""
    return {
        "storage": [args.storage],
        "device_memory": args.device_memory,
        "host_memory": args.host_memory,
        "step_aside": "never",  # stream although the small model would fit
    }


def parse(arguments: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with a directory for the model in any case."""
    args = arguments.parse_args(argv)
    args.model = args.model or write_small_model(os.path.join(args.storage, "small-model"))
    args.out = args.out or tempfile.mkdtemp(prefix="trained-", dir=args.storage)
    return args

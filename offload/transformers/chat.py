"""Conversations as training rows: rendered by the tokenizer's chat template, answers alone learned, rows filled up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from offload.errors import ConfigError

IGNORED = -100
"""Label of a token that is read but not learned."""

Conversation = Sequence[dict[str, Any]]
Row = dict[str, torch.Tensor]


def render(conversation: Conversation, tokenizer: Any) -> list[tuple[str, bool]]:
    """The conversation's text in pieces, each with whether it is learned: what the assistant says, to its end.

    Raises ConfigError for a tokenizer without a chat template, or one that changes earlier turns when later ones come.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("the tokenizer has no chat template: set tokenizer.chat_template")
    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(
            conversation[:number], tokenize=False, add_generation_prompt=True
        )
        answered = tokenizer.apply_chat_template(conversation[: number + 1], tokenize=False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise ConfigError(
                "the chat template writes earlier turns differently once later ones follow, so answers cannot be told "
                "apart: give each question and answer as a conversation of its own"
            )
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    return pieces


def tokens_of(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of one conversation, equally long."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in render(conversation, tokenizer):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    return ids, labels


def pack_chats(conversations: Iterable[Conversation], tokenizer: Any, sequence_length: int) -> list[Row]:
    """Rows of `sequence_length` tokens that hold as many whole conversations as fit, in their order.

    A row has `input_ids`, `labels` and `position_ids`, each (sequence_length,). Positions begin again with each
    conversation, from which models of transformers tell conversations apart: give no attention mask and no cache, and
    none sees another. What is left of a row is padding that nobody learns. A longer conversation is cut at the end.
    """
    rows: list[Row] = []
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def finish() -> None:
        n = sequence_length - len(ids)
        rows.append(
            {
                "input_ids": torch.tensor(ids + [padding] * n),
                "labels": torch.tensor(labels + [IGNORED] * n),
                "position_ids": torch.tensor(positions + list(range(n))),
            }
        )
        for filled in (ids, labels, positions):
            filled.clear()

    for conversation in conversations:
        more, learned = tokens_of(conversation, tokenizer)
        more, learned = more[:sequence_length], learned[:sequence_length]
        if not any(label != IGNORED for label in learned):
            continue
        if len(ids) + len(more) > sequence_length:
            finish()
        ids += more
        labels += [IGNORED, *learned[1:]]  # nothing before it says what its first token is
        positions += range(len(more))
    if ids:
        finish()
    return rows

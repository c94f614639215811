"""Text and JSON-lines files as batches of packed token sequences."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from typing import Any

import torch

from offload.errors import ConfigError

IGNORED = -100
"""Label of a token that is read but not learned."""

TEXT_PIECE_CHARACTERS = 1 << 16


_TABLES = {".csv": "", ".tsv": ", delimiter='\\t'"}
"""Endings of tables in text files, and what Python's reader has to be told of each."""


def check_kind(path: str) -> None:
    """Raise ConfigError for a table, whose separators and column names would be learned as text."""
    ending = os.path.splitext(path)[1].lower()
    if ending in _TABLES:
        raise ConfigError(
            f"{path} is a table: its line of column names and its separators would be learned as text. Make JSON lines "
            "of it, with columns named text, or prompt and completion: "
            'python -c "import csv, json, sys; [print(json.dumps(row)) for row in '
            f'csv.DictReader(sys.stdin{_TABLES[ending]})]" < {path} > {os.path.splitext(path)[0]}.jsonl'
        )


def _text_pieces(path: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a text file cut at line ends, each with whether it is learned; True throughout."""
    piece: list[str] = []
    n_characters = 0
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            piece.append(line)
            n_characters += len(line)
            if n_characters >= TEXT_PIECE_CHARACTERS:
                yield "".join(piece), True
                piece, n_characters = [], 0
    if piece:
        yield "".join(piece), True


def _parts_of(record: Any, where: str, tokenizer: Any) -> list[tuple[str, bool]]:
    """The (text, learned) parts of one JSON object."""
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return [(record["text"], True)]
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            return [(record["prompt"], False), (record["completion"], True)]
        if isinstance(record.get("messages"), list):
            if getattr(tokenizer, "chat_template", None) is None:
                raise ConfigError(f"{where}: has messages, but the tokenizer has no chat template")
            return [(tokenizer.apply_chat_template(record["messages"], tokenize=False), True)]
    found = f"an object with {', '.join(record) or 'nothing'}" if isinstance(record, dict) else "no object"
    raise ConfigError(
        f'{where}: expected {{"text": ...}}, {{"prompt": ..., "completion": ...}} (all of them strings) or '
        f'{{"messages": [...]}}, found {found}'
    )


class TokenStream:
    """Tokens of a whole file, 8 bytes each, and which of them are learned, as sequences of `sequence_length`."""

    def __init__(self, path: str, tokenizer: Any, sequence_length: int) -> None:
        self._ids, self._labels = array("i"), array("i")
        self._tokenizer = tokenizer
        self.sequence_length = sequence_length
        try:
            if path.endswith((".jsonl", ".json")):
                self._read_json_lines(path)
            else:
                for text, learned in _text_pieces(path):
                    self._add(text, learned)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: is not UTF-8 text: {error}: save it as such, or as JSON lines"
            ) from error
        n_whole = len(self._ids) // sequence_length
        if n_whole == 0:
            raise ConfigError(
                f"{path}: has {len(self._ids)} tokens, fewer than one sequence of {sequence_length}: give more text, "
                "or lower --sequence-length"
            )
        self._starts = [n * sequence_length for n in range(n_whole) if self._is_learned(n * sequence_length)]
        self.n_sequences = len(self._starts)
        self.n_left_out = n_whole - self.n_sequences
        """Sequences of which nothing is learned, as in the middle of a long prompt: a mean loss has no value there."""
        if self.n_sequences == 0:
            raise ConfigError(
                f"{path}: none of its {n_whole} sequences of {sequence_length} tokens has anything to learn: the "
                "completions are empty, or raise --sequence-length"
            )

    def _read_json_lines(self, path: str) -> None:
        end = getattr(self._tokenizer, "eos_token_id", None)
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise ConfigError(
                        f"{where}: is not JSON: {error.msg} at column {error.colno}; write one whole object a line"
                    ) from error
                for text, learned in _parts_of(record, where, self._tokenizer):
                    self._add(text, learned)
                if end is not None:
                    self._ids.append(end)
                    self._labels.append(end)

    def _add(self, text: str, learned: bool) -> None:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._ids.extend(ids)
        self._labels.extend(ids if learned else [IGNORED] * len(ids))

    def _is_learned(self, start: int) -> bool:
        """Whether any token of the sequence at `start` is predicted; its first one is not, nothing being before it."""
        return any(label != IGNORED for label in self._labels[start + 1 : start + self.sequence_length])

    @property
    def n_tokens(self) -> int:
        """Tokens in the file."""
        return len(self._ids)

    def _rows(self, tokens: array[int], order: list[int]) -> torch.Tensor:
        starts = [self._starts[i] for i in order]
        return torch.tensor([tokens[s : s + self.sequence_length] for s in starts], dtype=torch.long)

    def batches(self, batch_size: int, seed: int) -> Batches:
        """Endless batches of (batch_size, sequence_length) `input_ids` and `labels`, shuffled anew each epoch."""
        return Batches(self, batch_size, seed)

    def rows(self, order: list[int]) -> dict[str, torch.Tensor]:
        """The sequences with these numbers as one batch."""
        return {"input_ids": self._rows(self._ids, order), "labels": self._rows(self._labels, order)}


class Batches(Iterator[dict[str, torch.Tensor]]):
    """An endless shuffled stream of batches whose position can be saved: `state_dict` is a count, not an order."""

    def __init__(self, stream: TokenStream, batch_size: int, seed: int) -> None:
        self._stream = stream
        self._identity = {"batch_size": batch_size, "seed": seed, "n_sequences": stream.n_sequences}
        self._restart()

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self._identity["seed"])
        self._order: list[int] = []
        self._n_taken = 0

    def _take(self) -> list[int]:
        batch_size = self._identity["batch_size"]
        while len(self._order) < batch_size:
            self._order += torch.randperm(self._stream.n_sequences, generator=self._generator).tolist()
        chosen, self._order = self._order[:batch_size], self._order[batch_size:]
        self._n_taken += 1
        return chosen

    def __next__(self) -> dict[str, torch.Tensor]:
        return self._stream.rows(self._take())

    def state_dict(self) -> dict[str, Any]:
        """How many batches have been taken, of which data."""
        return {**self._identity, "batches": self._n_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was called. Raises ConfigError when the data or the batch is another."""
        for name, value in self._identity.items():
            if state[name] != value:
                raise ConfigError(
                    f"the run to be resumed had {name.replace('_', ' ')} {state[name]}, this one has {value}: give "
                    "it the same --data, --sequence-length, --batch-size and --seed"
                )
        self._restart()
        for _ in range(state["batches"]):
            self._take()

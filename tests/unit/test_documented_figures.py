"""Figures in the documents are what the benchmarks wrote, or what their formula gives.

A quoted figure stands between `<!-- figure FILE NAME KEY SCALE FORMAT -->` and `<!-- /figure -->`: it is
the value of KEY in the row NAME of benchmarks/results/FILE, divided by SCALE, in that format.
"""

from __future__ import annotations

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIGURE = re.compile(r"<!-- figure (\S+) (\S+) (\S+) (\S+) (\S+) -->(.*?)<!-- /figure -->")
MARKER = re.compile(r"<!-- figure\b")

QUOTES = [
    pytest.param(*match.groups(), id=f"{path.name}:{match.group(2)}:{match.group(3)}")
    for path in DOCUMENTS
    for match in FIGURE.finditer(path.read_text())
]


@pytest.mark.parametrize(("file", "name", "key", "scale", "form", "quoted"), QUOTES)
def test_a_quoted_figure_is_what_the_benchmark_wrote(
    file: str, name: str, key: str, scale: str, form: str, quoted: str
) -> None:
    rows = {row["name"]: row for row in json.loads((RESULTS / file).read_text())["rows"]}
    assert format(rows[name][key] / float(scale), form) == quoted


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_figure_marker_can_be_read(path: pathlib.Path) -> None:
    text = path.read_text()
    assert len(MARKER.findall(text)) == len(FIGURE.findall(text))


# hidden, layers, intermediate, key/value width, vocabulary, tied head
LLAMA_SHAPES = {
    "SmolLM2 135M": (576, 30, 1536, 192, 49152, True),
    "Llama 7B": (4096, 32, 11008, 4096, 32000, False),
    "Llama 13B": (5120, 40, 13824, 5120, 32000, False),
    "Llama 70B": (8192, 80, 28672, 1024, 32000, False),
}


def sizes_row(name: str) -> str:
    hidden, layers, intermediate, key_value, vocab, tied = LLAMA_SHAPES[name]
    block = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * intermediate + 2 * hidden
    root = vocab * hidden * (1 if tied else 2) + hidden
    numel = root + layers * block
    device_nbytes = (2 + 4) * root + (2 * 2 + 4) * block
    digits = 2 if numel < 1e9 else 1
    step_s = numel * (14 / 7e9 + 12 / 6e9)
    return (
        f"| {name} | {numel / 1e9:.{digits}f} B | {16 * numel / 1e9:.1f} GB | {12 * numel / 1e9:.1f} GB "
        f"| {device_nbytes / 1e9:.1f} GB | {step_s:.1f} s |"
    )


@pytest.mark.parametrize("name", LLAMA_SHAPES)
def test_the_table_of_what_fits_follows_its_formula(name: str) -> None:
    assert sizes_row(name) in (ROOT / "README.md").read_text().splitlines()

"""Every line of docs/faults.md names a test that is there, and every error it names is one of ours or the system's."""

from __future__ import annotations

import ast
import builtins
import pathlib
import re

import pytest

from offload import errors

ROOT = pathlib.Path(__file__).resolve().parents[2]


def rows():
    lines = (ROOT / "docs/faults.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_each_fault_has_its_test(row):
    path, _, name = row[-1].strip("`").partition("::")
    functions = {
        n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)
    }
    assert name in functions, f"{path} has no {name}"


def test_each_error_is_a_class():
    named = {word for row in rows() for word in re.findall(r"`(\w+(?:Error|Interrupt))`", row[1])}
    assert len(named) > 5
    for word in named:
        assert hasattr(errors, word) or hasattr(builtins, word), word


FAULTS = [
    "EIO on the n-th read or write",
    "short transfers",
    "disk full before training",
    "disk full in the middle of a step",
    "drive unplugged",
    "corrupt chunk",
    "truncated store file",
    "manifest of a newer version",
    "manifest of another model",
    "host memory runs out",
    "Ctrl-C",
    "SIGTERM",
    "kill -9",
    "power loss",
    "exception in the user's forward or backward",
    "a loss that is not finite",
    "gradients that are not finite",
    "another batch shape in every step",
    "`step()` twice",
    "backward twice",
    "a second process",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_that_a_workstation_has_is_answered(fault):
    answers = [row for row in rows() if fault in row[0]]
    assert answers
    for _, error, outcome, _ in answers:
        assert error
        assert outcome

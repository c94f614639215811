"""`offload finetune --optimizer --optimizer-state` trains with what it names, and writes its bytes."""

from __future__ import annotations

import json

import pytest

from tests.integration.command_line import finetune

pytest.importorskip("transformers")


def summary_of(workplace, capsys, *more):
    assert finetune(workplace, "--json", *more) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_every_optimizer_of_the_command_line_learns(workplace, capsys, name):
    lr = {"lion": "3e-3", "sgd": "0.3"}.get(name, "1e-2")
    summary = summary_of(workplace, capsys, "--optimizer", name, "--lr", lr)
    assert summary["last_loss"] < summary["first_loss"]


def test_moments_in_8_bits_write_half_of_what_fp32_ones_write(workplace, capsys):
    """12 bytes a parameter of which 6 are left, beside what padding and activations take in either."""
    exact = summary_of(workplace, capsys)
    small = summary_of(workplace, capsys, "--optimizer-state", "8bit")
    key = "written_bytes_per_parameter_and_step"
    assert small[key] < 0.65 * exact[key]
    assert small["last_loss"] == pytest.approx(exact["last_loss"], rel=0.05)


def test_an_optimizer_that_is_not_known_is_refused_before_anything_is_read(workplace, capsys):
    assert finetune(workplace, "--optimizer", "lamb") == 2
    assert "adamw, lion, sgd, adafactor" in capsys.readouterr().err

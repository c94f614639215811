"""SMART wear: read through smartctl where it is allowed, and a sentence where it is not."""

from __future__ import annotations

import json
import math
import os

import pytest

from offload.cli.totals import lifetime_steps
from offload.planner.hardware import load_hardware
from offload.tiers import wear
from offload.tiers.wear import Wear, parse_smart, wear_of

LOG = {"nvme_smart_health_information_log": {"percentage_used": 37, "data_units_written": 2_000_000}}


def fake_smartctl(place, output):
    program = place / "smartctl"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o700)


def test_the_log_is_read_in_its_units():
    """2 million data units are 1.024 TB."""
    assert parse_smart("/dev/nvme0n1", LOG) == Wear("/dev/nvme0n1", 0.37, 1_024_000_000_000)
    assert parse_smart("/dev/sda", {"ata_smart_attributes": {}}) is None
    assert parse_smart("/dev/sda", []) is None


def test_steps_left_count_from_what_is_not_used_yet():
    used = Wear("/dev/nvme0n1", 0.5, 0)
    assert used.steps_left(1_200e12, 84e9) == pytest.approx(0.5 * 1_200e12 / 84e9)
    assert Wear("/dev/nvme0n1", 1.2, 0).steps_left(1e12, 1) == 0
    assert used.steps_left(1e12, 0) == math.inf


def test_the_program_is_asked_for_the_directorys_device(tmp_path, monkeypatch):
    monkeypatch.setattr(wear, "device_of", lambda _: "/dev/nvme7n1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake_smartctl(tmp_path, json.dumps(LOG))
    assert wear_of(str(tmp_path)) == Wear("/dev/nvme7n1", 0.37, 1_024_000_000_000)
    fake_smartctl(tmp_path, '{"smartctl": {"exit_status": 2}}')
    assert "may not ask" in wear_of(str(tmp_path))
    fake_smartctl(tmp_path, "Permission denied")
    assert "smartctl /dev/nvme7n1" in wear_of(str(tmp_path))


def test_without_program_or_device_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(wear, "device_of", lambda _: "/dev/nvme7n1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in wear_of(str(tmp_path))
    monkeypatch.setattr(wear, "device_of", lambda _: None)
    assert "no block device" in wear_of(str(tmp_path))
    monkeypatch.undo()
    assert isinstance(wear_of(str(tmp_path / "nowhere")), str)


def test_the_lifetime_in_the_summary_counts_what_the_drives_have_taken_already():
    """Rated for 1200 TB each, written evenly: the one that is worn most ends it."""
    one = load_hardware("laptop-8gb")
    assert lifetime_steps(one, ["smartctl is not installed"], 1e12) == pytest.approx(1200)
    assert lifetime_steps(one, [Wear("/dev/nvme0n1", 0.75, 0)], 1e12) == pytest.approx(300)
    assert lifetime_steps(one, [], 1e12) == pytest.approx(1200)
    two = one.model_copy(update={"drives": (one.drives[0], one.drives[0])})
    assert lifetime_steps(two, [Wear("a", 0.5, 0), Wear("b", 0.0, 0)], 1e12) == pytest.approx(1200)
    assert lifetime_steps(two, [Wear("a", 1.5, 0), "no"], 1e12) == 0
    unknown = load_hardware("laptop-8gb", ["drives.0.endurance_nbytes=null"])
    assert lifetime_steps(unknown, [Wear("a", 0.5, 0)], 1e12) is None
    assert lifetime_steps(None, [], 1e12) is None
    assert lifetime_steps(one, ["no"], 0) is None

"""Killed or without power at random instants, a run ends with the bits it would have had (tests/fault/campaign.py)."""

from __future__ import annotations

import json
import os
import secrets

import pytest

from tests.child import end, start

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1500)]

CAMPAIGN = """
import json, pathlib, sys
import torch
torch.set_num_threads(1)
from tests.fault.campaign import campaign
print(json.dumps(campaign(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
"""


def run_campaign(place, n_kills):
    """`n_kills` may be raised by OFFLOAD_CRASH_KILLS; OFFLOAD_CRASH_SEED repeats a campaign."""
    seed = int(os.environ.get("OFFLOAD_CRASH_SEED", secrets.randbits(32)))
    n_kills = int(os.environ.get("OFFLOAD_CRASH_KILLS", n_kills))
    print(f"seed {seed}")
    status, out, err = end(start(CAMPAIGN, place, seed, n_kills), 1400)
    assert status == 0, f"seed {seed}: {err[-3000:]}"
    done = json.loads(out.splitlines()[-1])
    print(done)
    return done


@pytest.mark.slow
def test_a_few_kills_and_power_losses_lose_nothing(tmp_path):
    done = run_campaign(tmp_path, 10)
    assert done["kill"] + done["power"] >= 10
    assert done["complete_runs"] >= 1


@pytest.mark.long
def test_two_hundred_kills_and_power_losses_lose_nothing(tmp_path):
    done = run_campaign(tmp_path, 220)
    assert done["kill"] + done["power"] >= 220
    assert min(done["kill"], done["power"]) >= 40
    assert all(n >= 30 for n in done["phases"].values()), f"some phase was hit too seldom: {done['phases']}"

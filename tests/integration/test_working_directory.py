"""A run stays where it was begun when the process goes to another working directory (a notebook, a launcher)."""

from __future__ import annotations

import os

import torch

import offload
from offload.config import Config
from tests.fault.training import make_run, steps


def test_a_relative_storage_directory_stays_the_same_and_nothing_is_left_in_it(tmp_path, monkeypatch):
    expected = steps(*make_run(tmp_path / "elsewhere"), 2)
    monkeypatch.chdir(tmp_path)
    model, optimizer = make_run("store")
    monkeypatch.chdir(tmp_path / "elsewhere")
    got = steps(model, optimizer, 2)
    assert all(torch.equal(got[name], values) for name, values in expected.items())
    offload.save(model, str(tmp_path / "saved"))
    model.offload.close()
    assert os.listdir(tmp_path / "store") == []


def test_a_durable_run_in_a_relative_directory_is_found_again_from_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    model, optimizer = make_run("store", durability="step")
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = steps(model, optimizer, 2)
    model.offload.close()
    model, optimizer = make_run("../store", durability="step")
    assert offload.resume(model, "../store").step == 2
    got = steps(model, optimizer, 0)
    assert all(torch.equal(got[name], values) for name, values in expected.items())
    model.offload.close(remove=True)
    assert os.listdir(tmp_path / "store") == []


def test_a_save_beside_training_is_completed_where_it_was_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    model, optimizer = make_run("store")
    steps(model, optimizer, 1)
    offload.save(model, "saved", wait=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.offload.wait_saved()
    assert [name for name in os.listdir(tmp_path / "saved") if name.startswith("step-")] == ["step-000000001"]
    model.offload.close()


def test_a_tilde_is_the_users_own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config.checked(storage="~/store").storage == [str(tmp_path / "store")]

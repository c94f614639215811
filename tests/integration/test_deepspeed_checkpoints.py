"""save_checkpoint and load_checkpoint: training goes on with the bits it would have had."""

import argparse
import json
import logging

import pytest
import torch

import offload.deepspeed as deepspeed
from offload.errors import CheckpointError, UsageError
from offload.tiers import encoding
from offload.tiers.encoding import _tensor
from tests.conftest import batches, build, slow_but
from tests.drive_order import recorded

PLACES = ("none", "cpu", "nvme", "on the device")
ACROSS = [("on the device", "nvme"), ("nvme", "on the device")]
ON_THE_DEVICE = {"device": "emulated", "step_aside": "always", "device_memory": "100MB"}


def start(tmp_path, where="nvme", precision=None, seed=0, **more):
    aside = ON_THE_DEVICE if where == "on the device" else {}
    device = {"device": "none" if aside else where}
    if where == "nvme":
        device["nvme_path"] = str(tmp_path / "store")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_max_lr": 2e-3, "warmup_num_steps": 3, "total_num_steps": 10},
        },
        "zero_optimization": {"stage": 3, "offload_optimizer": device, "offload_param": device},
        "offload": {"chunk_elements": 4096, **aside},
        **more,
    }
    if precision is not None:
        config[precision] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=build("llama", seed=seed), config=config)
    return engine


def take_steps(engine, n_steps, skip=0):
    losses = []
    for batch in batches(skip + n_steps)[skip:]:
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append((loss.item(), engine.get_lr(), engine.get_global_grad_norm(), engine.cur_scale))
    return losses


def weights(engine):
    return {name: t.clone() for block in engine.offload.iter_blocks() for name, t in block}


@pytest.mark.parametrize("precision", slow_but([None, "fp16"], [None, "bf16", "fp16"]))
@pytest.mark.parametrize(
    ("saved_in", "loaded_in"),
    slow_but([("nvme", "nvme"), *ACROSS], [("nvme", "nvme"), ("none", "nvme"), ("nvme", "cpu"), *ACROSS]),
)
def test_a_resumed_run_has_the_bits_of_an_uncut_one(tmp_path, precision, saved_in, loaded_in):
    uncut = start(tmp_path, saved_in, precision)
    expected = take_steps(uncut, 6)
    end = weights(uncut)
    uncut.destroy()

    first = start(tmp_path, saved_in, precision)
    take_steps(first, 3)
    assert (
        first.save_checkpoint(tmp_path / "out", client_state={"seen": 3, "cursor": torch.arange(3)}) is True
    )
    first.destroy()

    second = start(tmp_path, loaded_in, precision, seed=5)
    path, client_state = second.load_checkpoint(tmp_path / "out")
    assert path == str(tmp_path / "out" / "global_step3")
    assert client_state["seen"] == 3
    assert torch.equal(client_state["cursor"], torch.arange(3))
    assert (second.global_steps, second.global_samples, second.micro_steps) == (3, 12, 3)
    assert take_steps(second, 3, skip=3) == expected[3:]
    assert all(torch.equal(tensor, end[name]) for name, tensor in weights(second).items())
    second.destroy()


def test_latest_is_on_the_drive_before_it_gets_its_name(tmp_path, monkeypatch):
    """Power may go at any instant: what `latest` names is complete, and so is `latest`."""
    engine = start(tmp_path, "nvme")
    take_steps(engine, 1)
    done = recorded(monkeypatch)
    engine.save_checkpoint(tmp_path / "out")
    assert done[-3:] == [("sync", "latest.partial"), ("rename", "latest.partial"), ("sync", "out")]
    assert ("sync", "extents.bin") in done[:-3]
    engine.destroy()


def test_loading_goes_back_after_steps_too(tmp_path):
    engine = start(tmp_path)
    take_steps(engine, 2)
    engine.save_checkpoint(str(tmp_path / "out"), tag="here")
    expected = take_steps(engine, 2, skip=2)
    engine.load_checkpoint(str(tmp_path / "out"), tag="here")
    assert take_steps(engine, 2, skip=2) == expected
    engine.destroy()


def test_latest_names_the_last_one_saved_unless_told_not_to(tmp_path):
    engine = start(tmp_path, "none")
    for tag, latest in (("first", True), ("second", True), ("third", False)):
        take_steps(engine, 1)
        engine.save_checkpoint(tmp_path / "out", tag=tag, save_latest=latest)
    assert (tmp_path / "out" / "latest").read_text() == "second"
    assert engine.load_checkpoint(tmp_path / "out")[0] == str(tmp_path / "out" / "second")
    assert engine.global_steps == 2
    engine.save_checkpoint(tmp_path / "out", tag="first")  # again, under a name that is taken
    assert len(list((tmp_path / "out" / "first").glob("step-*"))) == 1
    assert engine.load_checkpoint(tmp_path / "out", tag="first")[0] is not None
    assert engine.global_steps == 2
    engine.destroy()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("option", [{"load_module_only": True}, {"load_optimizer_states": False}])
def test_weights_alone_start_a_fresh_optimizer(tmp_path, where, option):
    """The next step is the one that a new run from these very weights takes."""
    engine = start(tmp_path, where)
    take_steps(engine, 3)
    engine.save_checkpoint(tmp_path / "out")
    saved = weights(engine)
    engine.destroy()

    other = start(tmp_path, where, seed=5, scheduler={"type": "ConstantLR", "params": {"factor": 1.0}})
    other.load_checkpoint(tmp_path / "out", load_lr_scheduler_states=False, **option)
    assert other.global_steps == (0 if "load_module_only" in option else 3)
    found = take_steps(other, 2, skip=3)
    after = weights(other)
    other.destroy()

    model = build("llama")
    model.load_state_dict({**model.state_dict(), **saved})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for batch, got in zip(batches(5)[3:], found, strict=True):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert got[0] == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert (after[name] - parameter.detach()).abs().max() <= 0.02 * 2e-3, name


def test_what_is_not_there_is_not_loaded_and_said(tmp_path, caplog):
    engine = start(tmp_path, "none")
    with caplog.at_level(logging.WARNING, "offload"):
        assert engine.load_checkpoint(tmp_path) == (None, None)
        assert engine.load_checkpoint(tmp_path, tag="never") == (None, None)
    assert "latest is not there" in caplog.text
    assert "never holds no checkpoint" in caplog.text
    engine.destroy()


def test_the_client_state_is_encoded_once(tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        encoding, "_tensor", lambda value, where: encoded.append(where) or _tensor(value, where)
    )
    engine = start(tmp_path, "none")
    engine.save_checkpoint(tmp_path / "out", client_state={"cursor": torch.arange(3)})
    engine.destroy()
    assert [where for where in encoded if "cursor" in where] == ["client_state['cursor']"]


def test_misuse_is_refused(tmp_path):
    engine = start(tmp_path, "none", gradient_accumulation_steps=2)
    batch = batches(1)[0]
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    engine.step()
    with pytest.raises(UsageError, match="step"):
        engine.save_checkpoint(tmp_path / "out")
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    engine.step()
    with pytest.raises(UsageError, match="tag"):
        engine.save_checkpoint(tmp_path / "out", tag="../elsewhere")
    with pytest.raises(UsageError, match=r"^client_state\['args'\] is a Namespace.*vars\(args\)"):
        engine.save_checkpoint(tmp_path / "out", client_state={"args": argparse.Namespace(lr=1)})
    engine.save_checkpoint(tmp_path / "out")
    engine.destroy()
    config = json.loads(json.dumps(engine.config))
    other, *_ = deepspeed.initialize(model=build("llama", layers=3), config=config)
    with pytest.raises(CheckpointError, match="another model"):
        other.load_checkpoint(tmp_path / "out")
    other.destroy()


def test_a_tag_saved_again_after_fewer_steps_replaces_what_an_earlier_run_left_there(tmp_path):
    earlier = start(tmp_path)
    take_steps(earlier, 2)
    earlier.save_checkpoint(tmp_path / "out", tag="best", client_state={"run": 1})
    earlier.destroy()
    engine = start(tmp_path)
    take_steps(engine, 1)
    assert engine.save_checkpoint(tmp_path / "out", tag="best", client_state={"run": 2})
    engine.destroy()
    engine = start(tmp_path)
    _, client_state = engine.load_checkpoint(tmp_path / "out")
    assert (client_state["run"], engine.global_steps) == (2, 1)
    engine.destroy()


def test_files_of_deepspeeds_own_are_refused_instead_of_training_from_the_start(tmp_path):
    folder = tmp_path / "out" / "global_step5"
    folder.mkdir(parents=True)
    (tmp_path / "out" / "latest").write_text("global_step5")
    for kind in ("model", "optim"):
        (folder / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt").write_bytes(b"")
    engine = start(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"global_step5: was written by DeepSpeed itself.*from_deepspeed"
    ):
        engine.load_checkpoint(tmp_path / "out")
    engine.destroy()

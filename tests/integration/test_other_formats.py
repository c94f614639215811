"""Weights from DeepSpeed ZeRO checkpoints, and exports that torch.distributed.checkpoint reads."""

from __future__ import annotations

import os
import sys
import types
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

import offload
from offload.errors import CheckpointError, ConfigError
from tests.conftest import build
from tests.drive_order import recorded

pytest.importorskip("transformers")


FOREIGN = "deepspeed.runtime.fp16.loss_scaler"


def foreign_object(monkeypatch):
    """An object of a class of DeepSpeed's, as its checkpoints have among the tensors; nobody has it at reading."""
    parts = FOREIGN.split(".")
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    scaler = type("LossScaler", (), {"__module__": FOREIGN})
    sys.modules[FOREIGN].LossScaler = scaler
    made = scaler()
    made.cur_scale = 1.0
    return made


def zero_checkpoint(place, named, n_ranks, stage):
    """Shards as DeepSpeed lays them out, made from whole tensors by the rules of its own reader."""
    patch = pytest.MonkeyPatch()
    scaler = foreign_object(patch)
    folder = place / "global_step5"
    folder.mkdir(parents=True)
    (place / "latest").write_text("global_step5")
    names = sorted(named)
    groups = [names[::2], names[1::2]]
    shapes = [OrderedDict((n, named[n].shape) for n in group) for group in groups]
    ranks = [[] for _ in range(n_ranks)]
    for group in groups:
        if stage == 3:
            for n in group:
                flat = named[n].float().reshape(-1)
                padded = torch.nn.functional.pad(flat, (0, -flat.numel() % n_ranks))
                for rank, part in zip(ranks, padded.chunk(n_ranks), strict=True):
                    rank.append(part.clone())
        else:
            flat = torch.cat([named[n].float().reshape(-1) for n in group])
            padded = torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * n_ranks)))
            for rank, part in zip(ranks, padded.chunk(n_ranks), strict=True):
                rank.append(part.clone())
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for index, rank in enumerate(ranks):
        held = {"zero_stage": stage, "partition_count": n_ranks, key: rank, "loss_scaler": scaler}
        torch.save(
            {"optimizer_state_dict": held}, folder / f"zero_pp_rank_{index}_mp_rank_00_optim_states.pt"
        )
        model = {
            "buffer_names": ["b"],
            "param_shapes": shapes,
            "module": {"b": torch.ones(3)},
            "shared_params": {},
        }
        prefix = f"zero_pp_rank_{index}_" if stage == 3 else ""
        torch.save(model, folder / f"{prefix}mp_rank_00_model_states.pt")
    patch.undo()
    return folder


@pytest.mark.parametrize("n_ranks", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_fp32_weights_of_a_zero_checkpoint_arrive_bit_for_bit(tmp_path, stage, n_ranks):
    model = build("llama", layers=2)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        named = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    zero_checkpoint(tmp_path / "zero", named, n_ranks, stage)
    path = offload.from_deepspeed(
        str(tmp_path / "zero"), str(tmp_path / "out"), config_from=str(tmp_path / "base")
    )
    written = load_file(path)
    assert torch.equal(written.pop("b"), torch.ones(3))
    assert written.keys() == named.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in named.items())
    with pytest.raises(ConfigError, match="is there already"):
        offload.from_deepspeed(str(tmp_path / "zero"), str(tmp_path / "out"))


def test_what_is_copied_beside_the_weights_of_a_zero_checkpoint_is_on_the_drive(tmp_path, monkeypatch):
    build("llama", layers=2).save_pretrained(tmp_path / "base")
    zero_checkpoint(tmp_path / "zero", {"v": torch.ones(2), "w": torch.ones(5)}, 1, 2)
    done = recorded(monkeypatch)
    offload.from_deepspeed(str(tmp_path / "zero"), str(tmp_path / "out"), config_from=str(tmp_path / "base"))
    names = sorted(os.listdir(tmp_path / "out"))
    assert "config.json" in names
    assert done[-len(names) - 1 :] == [("sync", name) for name in [*names, "out"]]


def test_missing_and_cut_shards_are_named(tmp_path):
    named = {f"w{i}": torch.randn(5, 3) for i in range(4)}
    folder = zero_checkpoint(tmp_path / "zero", named, 2, 3)
    shard = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="zero_pp_rank_1"):
        offload.from_deepspeed(str(tmp_path / "zero"), str(tmp_path / "a"))
    os.unlink(shard)
    with pytest.raises(CheckpointError, match="2 ranks were saved, 1 of their files"):
        offload.from_deepspeed(str(tmp_path / "zero"), str(tmp_path / "b"))
    (tmp_path / "zero" / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="not a bare name"):
        offload.from_deepspeed(str(tmp_path / "zero"), str(tmp_path / "c"))
    with pytest.raises(CheckpointError, match="no \\*_optim_states"):
        offload.from_deepspeed(str(tmp_path), str(tmp_path / "d"))


class Executes:
    """A pickle that runs a command when it is loaded by the ordinary unpickler."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_executes_something_is_refused_and_executes_nothing(tmp_path):
    folder = zero_checkpoint(tmp_path / "zero", {"w": torch.randn(4)}, 1, 3)
    trap = str(tmp_path / "executed")
    torch.save({"optimizer_state_dict": Executes(trap)}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="more than tensors and plain data"):
        offload.from_deepspeed(str(tmp_path / "zero"), str(tmp_path / "out"))
    assert not os.path.exists(trap)


def test_torch_distributed_checkpoint_reads_an_export(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    if not hasattr(dcp, "HuggingFaceStorageReader"):
        pytest.skip("this torch reads no safetensors through torch.distributed.checkpoint")
    model = build("llama", layers=2, dtype=torch.bfloat16)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    model, _ = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), storage=[str(tmp_path / "store")], step_aside="never"
    )
    offload.export(model, str(tmp_path / "out"))
    model.offload.close()
    read = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "out")), no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())

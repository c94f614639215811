"""Every example of offloading in DeepSpeed's documentation is read, and puts the state where its author meant it.

The configurations are retyped from docs/_tutorials/zero-offload.md, docs/_tutorials/zero.md, docs/_pages/config-json.md
and docs/_tutorials/zenflow.md of DeepSpeed 0.19, with the choices of their placeholders written out and the local
drive replaced by a directory.
"""

import copy

import pytest
import torch

import offload.deepspeed as deepspeed
from offload.errors import ConfigError
from tests.conftest import batches, build

BASE = {
    "train_batch_size": 4,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 1e-3, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "offload": {
        "chunk_elements": 4096,
        "prefetch_blocks": 1,
    },  # too few slots for every block to stay on the device
}
NVME = "/local_nvme"

ZERO_OFFLOAD = {
    "stage": 2,
    "offload_optimizer": {"device": "cpu"},
    "contiguous_gradients": True,
    "overlap_comm": True,
}
ZERO_INFINITY_CPU = {
    "stage": 3,
    "contiguous_gradients": True,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_prefetch_bucket_size": 1e7,
    "stage3_param_persistence_threshold": 1e5,
    "reduce_bucket_size": 1e7,
    "sub_group_size": 1e9,
    "offload_optimizer": {"device": "cpu"},
    "offload_param": {"device": "cpu"},
}
PARAMETER_NVME = {
    "device": "nvme",
    "nvme_path": NVME,
    "pin_memory": True,
    "buffer_count": 5,
    "buffer_size": 1e8,
    "max_in_cpu": 1e9,
}
OPTIMIZER_NVME = {
    "device": "nvme",
    "nvme_path": NVME,
    "pin_memory": True,
    "ratio": 0.3,
    "buffer_count": 4,
    "fast_init": False,
}
AIO = {
    "block_size": 1048576,
    "queue_depth": 8,
    "thread_count": 1,
    "single_submit": False,
    "overlap_events": True,
}

# name: (zero_optimization, the rest, optimizer states on storage, parameters on storage)
EXAMPLES = {
    "ZeRO stage 1": ({"stage": 1, "reduce_bucket_size": 5e8}, {}, "device", "device"),
    "ZeRO-Offload, stage 2": (ZERO_OFFLOAD, {}, "host", "host"),
    "ZeRO-Offload, older spelling": ({"stage": 2, "cpu_offload": True}, {}, "host", "host"),
    "ZeRO-Infinity to DRAM": (ZERO_INFINITY_CPU, {}, "host", "host"),
    "parameters to DRAM": (
        {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}},
        {},
        "host",
        "host",
    ),
    "optimizer to NVMe": ({"stage": 3, "offload_optimizer": OPTIMIZER_NVME}, {"aio": AIO}, "storage", "host"),
    "both to NVMe": (
        {"stage": 3, "offload_optimizer": OPTIMIZER_NVME, "offload_param": PARAMETER_NVME},
        {"aio": AIO},
        "storage",
        "host",  # max_in_cpu holds a billion elements, which is more than this model has
    ),
    "both to NVMe, nothing in DRAM": (
        {
            "stage": 3,
            "offload_optimizer": OPTIMIZER_NVME,
            "offload_param": {**PARAMETER_NVME, "max_in_cpu": 0, "pin_memory": False},
        },
        {"aio": AIO, "bf16": {"enabled": True}},
        "storage",
        "storage",
    ),
    "optimizer to NVMe, parameters to DRAM, fp16": (
        {"stage": 3, "offload_optimizer": OPTIMIZER_NVME, "offload_param": {"device": "cpu"}},
        {
            "fp16": {
                "enabled": True,
                "auto_cast": False,
                "loss_scale": 0,
                "initial_scale_power": 16,
                "loss_scale_window": 1000,
                "hysteresis": 2,
                "consecutive_hysteresis": False,
                "min_loss_scale": 1,
                "fp16_master_weights_and_grads": False,
            }
        },
        "storage",
        "host",
    ),
    "activation checkpoints in DRAM": (
        ZERO_INFINITY_CPU,
        {
            "activation_checkpointing": {
                "partition_activations": False,
                "cpu_checkpointing": True,
                "contiguous_memory_optimization": False,
                "number_checkpoints": None,
                "synchronize_checkpoint_boundary": False,
                "profile": False,
            }
        },
        "host",
        "host",
    ),
}


def with_directory(value, directory):
    """The same with the documentation's drive replaced."""
    if isinstance(value, dict):
        return {key: with_directory(item, directory) for key, item in value.items()}
    return directory if value == NVME else value


def placed(engine):
    """(where optimizer states are, where parameters are): "device", "host" or "storage"."""
    if engine.offload.aside:
        return "device", "device"
    placement = engine.offload.placement
    states = "storage" if not any(placement.host_chunks) else "host"
    if states == "host":
        assert placement.storage_nbytes == 0
    params = "host" if all(placement.params_in_host) else "storage"
    if params == "storage":
        assert not any(placement.params_in_host)
    return states, params


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_its_author_meant(tmp_path, name):
    zero, rest, states, params = EXAMPLES[name]
    store = tmp_path / "nvme"
    config = with_directory({**copy.deepcopy(BASE), "zero_optimization": zero, **rest}, str(store))
    model = build("llama")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    assert placed(engine) == (states, params)
    assert store.exists() == (states == "storage")
    if "activation_checkpointing" in rest:
        assert engine.offload.config.activations == "host"
    if zero.get("offload_param", {}).get("pin_memory") is False:
        assert engine.offload.config.pin == "never"
    if "aio" in rest:
        assert engine.offload.config.io_queue_depth == 8
        assert engine.offload.config.io_block_nbytes == 1048576
    losses = []
    for _ in range(4):
        batch = batches(1)[0]
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if states == "storage":
        assert engine.offload.counters()["written_bytes"] > 0
    engine.destroy()


@pytest.mark.parametrize(
    "name", ["ZeRO-Infinity to DRAM", "optimizer to NVMe", "both to NVMe, nothing in DRAM"]
)
def test_a_device_with_memory_of_its_own_changes_neither_the_place_nor_a_bit(tmp_path, name):
    zero, rest, states, params = EXAMPLES[name]
    results = []
    for device in ("cpu", "emulated"):
        config = with_directory(
            {**copy.deepcopy(BASE), "zero_optimization": zero, **rest}, str(tmp_path / "nvme")
        )
        config["offload"] = {**BASE["offload"], "device": device}
        engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
        assert placed(engine)[1] == params
        assert (engine.offload.placement.storage_nbytes > 0) == (states == "storage")
        losses = []
        for batch in batches(3):
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        results.append(losses)
        engine.destroy()
    assert results[0] == results[1]


def test_max_in_cpu_is_the_parameters_that_host_memory_holds(tmp_path):
    model = build("llama")
    per_block = sum(p.numel() for p in model.model.layers[0].parameters())
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    for n_blocks in (0, 1, 3):
        zero = {
            "stage": 3,
            "offload_param": {**nvme, "max_in_cpu": n_blocks * per_block},
            "offload_optimizer": nvme,
        }
        engine, *_ = deepspeed.initialize(model=build("llama"), config={**BASE, "zero_optimization": zero})
        assert engine.offload.placement.params_in_host == [i < n_blocks for i in range(4)]
        assert not any(engine.offload.placement.host_chunks)
        engine.destroy()


def test_two_drives_are_striped_over(tmp_path):
    zero = {
        "stage": 3,
        "offload_param": {"device": "nvme", "nvme_path": str(tmp_path / "a"), "max_in_cpu": 0},
        "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path / "b")},
    }
    engine, *_ = deepspeed.initialize(model=build("llama"), config={**BASE, "zero_optimization": zero})
    assert [len(list((tmp_path / name).glob("*.store"))) for name in "ab"] == [1, 1]
    engine.destroy()


def test_zenflow_is_refused_with_its_remedy():
    zenflow = {"topk_ratio": 0.05, "select_strategy": "auto", "select_interval": "auto", "update_interval": 4}
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "zenflow": zenflow}
    with pytest.raises(ConfigError, match="exact"):
        deepspeed.initialize(model=torch.nn.Linear(1, 1), config={**BASE, "zero_optimization": zero})

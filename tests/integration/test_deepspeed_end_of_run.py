"""What scripts for DeepSpeed ask at the end of an epoch and of a run: counters, the configuration, and the weights.

The oracles are DeepSpeed 0.19.8's answers, and the weights that the engine gives.
"""

from __future__ import annotations

import pytest
import torch

import offload.deepspeed as deepspeed
from offload.errors import UsageError
from tests.conftest import batches, build
from tests.integration.test_deepspeed_engine import configuration, weights


def trained(tmp_path, n_steps=2, *, model=None, **more):
    engine, *_ = deepspeed.initialize(model=model or build("llama"), config=configuration(tmp_path, **more))
    for batch in batches(n_steps):
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
    return engine


@pytest.mark.parametrize(
    ("more", "dtype"),
    [
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}}, torch.float16),
        ({}, torch.float32),
    ],
    ids=["bf16", "fp16", "fp32"],
)
def test_the_consolidated_weights_are_the_models_in_the_engines_dtype(tmp_path, more, dtype):
    engine = trained(tmp_path, **more)
    expected = engine.module_state_dict()
    for found in (engine._zero3_consolidated_16bit_state_dict(), engine._consolidated_16bit_state_dict()):
        assert found.keys() == expected.keys()
        assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {dtype}
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in expected.items())
    engine.destroy()


def test_an_epochs_end_counts_epochs_and_samples_a_second(tmp_path):
    engine = trained(tmp_path, n_steps=4, gradient_accumulation_steps=2)
    timer = engine.tput_timer
    assert (timer.micro_step_count, timer.global_step_count) == (4, 2)
    engine.eval()
    with torch.no_grad():
        engine(input_ids=batches(1)[0])
    engine.train()
    timer.update_epoch_count()
    for batch in batches(2):
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
    assert (timer.epoch_count, timer.micro_step_count, timer.global_step_count) == (1, 2, 3)
    assert 0 < timer.avg_samples_per_sec() < float("inf")
    engine.set_train_batch_size(16)
    assert timer.batch_size == 16
    engine.empty_partition_cache()
    engine.allreduce_gradients()
    engine.destroy()


# method: DeepSpeed 0.19.8's answer for the configuration of the test
ANSWERS = {
    "optimizer_name": "AdamW",
    "scheduler_name": "WarmupLR",
    "scheduler_params": {"warmup_num_steps": 4},
    "wall_clock_breakdown": False,
    "dump_state": True,
    "dataloader_drop_last": True,
    "torch_autocast_enabled": False,
    "zero_optimization_partition_gradients": True,
    "zero_optimization_partition_weights": True,
    "zero_gather_16bit_weights_on_model_save": True,
    "zero_use_cpu_optimizer": True,
    "zero_cpu_offload": True,
    "zero_offload_param": None,
}


def test_an_engine_answers_for_the_rest_of_its_configuration(tmp_path):
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}
    engine = trained(
        tmp_path, 0, zero_optimization=zero, scheduler=scheduler, dump_state=True, dataloader_drop_last=True
    )
    assert {name: getattr(engine, name)() for name in ANSWERS} == ANSWERS
    section = engine.zero_offload_optimizer()
    assert (section.device, section.nvme_path, section.pin_memory) == ("cpu", None, True)
    assert engine.optimizer_params() == configuration(tmp_path)["optimizer"]["params"]
    engine.destroy()


def test_the_optimizer_says_whether_the_last_step_overflowed_and_the_scale(tmp_path):
    engine = trained(tmp_path, 1, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    assert (engine.optimizer.overflow, engine.optimizer.cur_scale) == (False, 256.0)
    batch = batches(1)[0]
    engine.backward(engine(input_ids=batch, labels=batch).loss * float("inf"))
    engine.step()
    assert (engine.optimizer.overflow, engine.optimizer.cur_scale) == (True, 128.0)
    assert engine.optimizer.cur_scale == engine.cur_scale
    engine.destroy()


def test_a_load_that_need_not_be_strict_loads_what_was_saved(tmp_path):
    engine = trained(tmp_path)
    expected = weights(engine)
    engine.save_checkpoint(tmp_path / "saved", client_state={"epoch": 3})
    engine.destroy()
    engine = trained(tmp_path, n_steps=0)
    path, state = engine.load_checkpoint(tmp_path / "saved", load_module_strict=False)
    assert path.endswith("global_step2")
    assert state == {"epoch": 3}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(engine).items())
    with pytest.raises(UsageError, match="custom_load_fn"):
        engine.load_checkpoint(tmp_path / "saved", custom_load_fn=print)
    engine.destroy()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("monitor", r"log engine\.get_lr"),
        ("timers", r"offload\.last_step"),
        ("_config", r"engine\.config is the configuration"),
        ("load_module_state_dict", "before initialize"),
        ("offload_states", "device_memory"),
        ("something", r"docs/deepspeed\.md"),
    ],
)
def test_what_the_engine_does_not_have_names_what_to_use(tmp_path, name, said):
    engine = trained(tmp_path, 0, where="none")
    with pytest.raises(AttributeError, match=said):
        getattr(engine, name)
    engine.destroy()

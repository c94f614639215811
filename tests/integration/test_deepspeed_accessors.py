"""What loops ask DeepSpeed's engine for, and its `no_sync`: the answers of 0.19, for the configuration that is used."""

from __future__ import annotations

import pytest
import torch

import offload.deepspeed as deepspeed
from offload.errors import UsageError
from tests.conftest import batches, build
from tests.integration.test_deepspeed_engine import BOUND, configuration, weights

ANSWERS = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "managed_gradient_accumulation": True,
    "gradient_clipping": 0.5,
    "zero_optimization_stage": 3,
    "zero_optimization": True,
    "steps_per_print": 7,
    "fp16_enabled": False,
    "bfloat16_enabled": True,
    "loss_scale": 0.0,
    "dynamic_loss_scale": True,
    "get_batch_info": (8, 4, 2),
    "get_lr": [2e-3],
    "get_mom": [(0.9, 0.95)],
    "get_global_grad_norm": None,
    "was_step_applied": False,
    "is_gradient_accumulation_boundary": False,
}


def start(tmp_path, **more):
    engine, *_ = deepspeed.initialize(model=build("llama"), config=configuration(tmp_path, **more))
    return engine


def test_an_engine_answers_what_its_configuration_says(tmp_path):
    engine = start(
        tmp_path,
        where="none",
        gradient_accumulation_steps=2,
        gradient_clipping=0.5,
        steps_per_print=7,
        bf16={"enabled": True},
    )
    assert {name: getattr(engine, name)() for name in ANSWERS} == ANSWERS
    engine.set_train_micro_batch_size(6)
    assert engine.get_batch_info() == (12, 6, 2)
    engine.destroy()


@pytest.mark.parametrize(("given", "dynamic"), [(0, True), (128.0, False)])
def test_an_engine_answers_for_fp16_and_without_zero(tmp_path, given, dynamic):
    fp16 = {"enabled": True, "loss_scale": given, "initial_scale_power": 9}
    engine = start(tmp_path, where="none", fp16=fp16, zero_optimization={"stage": 0})
    assert (engine.fp16_enabled(), engine.bfloat16_enabled()) == (True, False)
    assert (engine.dynamic_loss_scale(), engine.loss_scale()) == (dynamic, given)
    assert engine.cur_scale == (2.0**9 if dynamic else 128.0)
    assert (engine.zero_optimization(), engine.zero_optimization_stage()) == (False, 0)
    assert engine.gradient_clipping() == 1.0
    assert engine.steps_per_print() is None
    engine.destroy()


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_backwards_inside_no_sync_add_to_the_one_outside(tmp_path, clip):
    """Each by its own loss: nothing but `gradient_accumulation_steps` divides, and it is 1 here."""
    engine = start(tmp_path, gradient_clipping=clip)
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for whole in batches(4, batch=12):
        first, second, last = whole.chunk(3)
        with engine.no_sync():
            for part in (first, second):
                engine.backward(engine(input_ids=part, labels=part).loss)
        engine.backward(engine(input_ids=last, labels=last).loss)
        engine.step()
        for part in (first, second, last):
            model(input_ids=part, labels=part).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    assert engine.global_steps == 4
    after = weights(engine)
    for name, parameter in model.named_parameters():
        assert (after[name] - parameter).abs().max() <= BOUND, name
    with engine.no_sync(), pytest.raises(UsageError, match="call it after the with block"):
        engine.step()
    engine.destroy()


def test_whole_tensors_as_a_state_dict_into_a_dict_of_the_callers(tmp_path):
    model = build("llama")
    frozen = "model.embed_tokens.weight"
    model.get_parameter(frozen).requires_grad_(False)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine, *_ = deepspeed.initialize(model=model, config=configuration(tmp_path))
    held = {"mine": torch.zeros(1)}
    assert engine.module_state_dict(held, "module.") is held
    assert held.keys() == {"mine", *("module." + name for name in expected)}
    assert all(torch.equal(held["module." + name], tensor) for name, tensor in expected.items())
    assert engine.module_state_dict(exclude_frozen_parameters=True).keys() == expected.keys() - {frozen}
    with pytest.raises(UsageError, match="leave it out for copies"):
        engine.module_state_dict(keep_vars=True)
    engine.destroy()


def test_a_data_loader_of_the_engines_for_any_dataset(tmp_path):
    """Shuffled as DeepSpeed's sampler does for training, in order for evaluation; as many as it is told to give."""
    engine = start(tmp_path, where="none", dataloader_drop_last=True)
    data = list(range(10))
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=1, rank=0)
    assert [batch.tolist() for batch in engine.deepspeed_io(data)] == [
        part for part in (list(sampler)[i : i + 4] for i in range(0, 10, 4)) if len(part) == 4
    ]
    assert [b.tolist() for b in engine.deepspeed_io(data, batch_size=5, route="eval")] == [data[:5], data[5:]]
    stream = engine.deepspeed_io(Counted(), collate_fn=sum)
    assert list(stream) == [0 + 1 + 2 + 3]
    engine.destroy()


class Counted(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(6))

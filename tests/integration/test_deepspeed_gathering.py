"""Scripts that ask a parameter at stage 3 whether they have to gather it, before they read it."""

from __future__ import annotations

import torch

import offload.deepspeed as deepspeed
from offload.deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from tests.conftest import build
from tests.integration.test_deepspeed_end_of_run import trained
from tests.integration.test_deepspeed_engine import weights


def to_fetch(parameters):
    """Those that a script for stage 3 gathers."""
    return [p for p in parameters if hasattr(p, "ds_id") and p.ds_status == ZeroParamStatus.NOT_AVAILABLE]


def test_a_script_that_gathers_what_is_partitioned_saves_the_weights(tmp_path):
    """As at the end of DeepSpeed-Chat's scripts: what does not say that it is partitioned is copied as it stands."""
    engine = trained(tmp_path)
    is_stage_3 = engine.zero_optimization_stage() == 3
    saved = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters(to_fetch([parameter]), enabled=is_stage_3):
                saved[name] = parameter.data.cpu()
        else:
            saved[name] = parameter.cpu()
    expected = weights(engine)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    engine.destroy()


def test_a_parameter_says_whether_it_holds_its_values(tmp_path):
    """As FastChat's scripts assert before they gather one."""
    model = build("llama")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    engine = trained(tmp_path, model=model)
    seen = set()
    for name, parameter in engine.module.named_parameters():
        assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.ds_status == ZeroParamStatus.AVAILABLE
        assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        assert (parameter.ds_shape, parameter.ds_numel) == (shapes[name], shapes[name].numel())
        seen.add(parameter.ds_id)
    assert len(seen) == len(shapes)
    engine.destroy()
    engine = trained(tmp_path, where="none", zero_optimization={"stage": 2})
    assert not any(hasattr(p, "ds_id") for p in engine.module.parameters())  # only at stage 3, as there
    engine.destroy()

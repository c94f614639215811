"""Scripts in the shapes that are published for DeepSpeed, with nothing but the import changed, against plain torch.

The first is that of DeepSpeed's CIFAR tutorial, the second that of its chat fine-tuning (a loop without a Trainer), the
third accumulates and asks for the boundary.
"""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch import nn

import offload.deepspeed as deepspeed
from offload.errors import ConfigError, UsageError
from tests.conftest import batches, build
from tests.integration.test_deepspeed_engine import BOUND, LR, configuration, in_memory, train, weights


def near(after, expected):
    assert after.keys() == expected.keys()
    return all((after[name] - tensor).abs().max() <= BOUND for name, tensor in expected.items())


def test_a_tutorials_loop_with_arguments_a_dataset_and_a_device_name(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(configuration(tmp_path)))
    rows = [{"input_ids": row, "labels": row} for batch in batches(2) for row in batch]
    # ---- the script
    parser = argparse.ArgumentParser(description="CIFAR")
    parser.add_argument("-e", "--epochs", default=30, type=int)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path), "-e", "2", "--local_rank", "0"])
    deepspeed.init_distributed()
    _local_rank = deepspeed.comm.get_rank()
    deepspeed.get_accelerator().set_device(_local_rank)
    if deepspeed.comm.get_rank() != 0:
        deepspeed.comm.barrier()
    net = build("llama")
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    model_engine, _optimizer, trainloader, __ = deepspeed.initialize(
        args=args, model=net, model_parameters=parameters, training_data=rows
    )
    local_device = deepspeed.get_accelerator().device_name(model_engine.local_rank)
    order, losses = [], []
    for _epoch in range(args.epochs):
        for data in trainloader:
            ids, labels = data["input_ids"].to(local_device), data["labels"].to(local_device)
            loss = model_engine(input_ids=ids, labels=labels).loss
            model_engine.backward(loss)
            model_engine.step()
            order.append(ids)
            losses.append(loss.item())
    # ---- end of the script
    after = weights(model_engine)
    model_engine.destroy()
    plain = build("llama")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    expected = []
    for ids in order:
        loss = plain(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert len(order) == 4
    assert losses == pytest.approx(expected, abs=1e-4)
    assert near(after, {name: p.detach() for name, p in plain.named_parameters()})


@pytest.mark.parametrize("kind", ["DeepSpeedCPUAdam", "FusedAdam"])
def test_a_loop_without_a_trainer_that_makes_its_own_optimizer_and_saves_gathered_parameters(tmp_path, kind):
    import transformers

    ds_config = configuration(tmp_path)
    del ds_config["optimizer"]
    # ---- the script
    with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=True):
        model = build("llama")
    with deepspeed.zero.GatheredParameters(model.lm_head.weight, modifier_rank=0):
        if deepspeed.comm.get_rank() == 0:
            with torch.no_grad():
                model.lm_head.weight.mul_(0.5)
    no_decay = ["norm"]
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)],
            "weight_decay": 0.1,
        },
        {
            "params": [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)],
            "weight_decay": 0.0,
        },
    ]
    optimizer = getattr(deepspeed.ops.adam, kind)(groups, lr=LR, betas=(0.9, 0.95))
    lr_scheduler = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=3)
    model, optimizer, _, lr_scheduler = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, lr_scheduler=lr_scheduler, dist_init_required=True
    )
    losses = []
    for batch in batches(3):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        model.backward(loss)
        model.step()
        losses.append(loss.item())
    saved = {}
    for name, parameter in model.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=model.zero_optimization_stage() == 3):
            saved[name] = parameter.data.cpu().clone()
    # ---- end of the script
    after = weights(model)
    assert all(torch.equal(saved[name], tensor) for name, tensor in after.items())
    model.destroy()

    plain = build("llama")
    with torch.no_grad():
        plain.lm_head.weight.mul_(0.5)
    named = dict(plain.named_parameters())
    theirs = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "norm" not in n], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if "norm" in n], "weight_decay": 0.0},
        ],
        lr=LR, betas=(0.9, 0.95),
    )  # fmt: skip
    schedule = transformers.get_scheduler("cosine", theirs, num_warmup_steps=1, num_training_steps=3)
    expected = []
    for batch in batches(3):
        loss = plain(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step()
        schedule.step()
        theirs.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-4)
    assert near(after, {name: p.detach() for name, p in named.items()})


BACKWARDS = {
    "engine.backward": lambda engine, loss: engine.backward(loss),
    "engine.scale": lambda engine, loss: engine.scale(loss).backward(),
}


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("how", BACKWARDS)
def test_accumulation_that_looks_at_the_boundary(tmp_path, how, clip):
    config = configuration(tmp_path, gradient_accumulation_steps=3, gradient_clipping=clip)
    config["bf16"] = {"enabled": False}
    model = build("llama")
    # ---- the script
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    n_updates, losses = 0, []
    for whole in batches(2, batch=12):
        for part in whole.chunk(engine.gradient_accumulation_steps()):
            loss = engine(input_ids=part, labels=part).loss
            BACKWARDS[how](engine, loss)
            if engine.is_gradient_accumulation_boundary():
                n_updates += 1
            engine.step()
            losses.append(loss.item())
    # ---- end of the script
    after = weights(engine)
    engine.destroy()
    expected_losses, expected, _ = in_memory(n_steps=2, accumulate=3, clip=clip or None)
    assert n_updates == 2
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert near(after, expected)


def test_backward_of_the_loss_itself_trains_where_nothing_has_to_be_scaled(tmp_path):
    config = configuration(tmp_path)
    engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
    for batch in batches(2):
        engine(input_ids=batch, labels=batch).loss.backward()
        engine.step()
    after = weights(engine)
    engine.destroy()
    _, expected = train(config, n_steps=2)
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("more", [{"gradient_accumulation_steps": 2}, {"fp16": {"enabled": True}}], ids=str)
def test_backward_of_the_loss_itself_is_refused_before_anything_moves_where_it_has_to_be(tmp_path, more):
    """Its gradients would be too large by the accumulation steps, or too small by the loss scale."""
    config = configuration(tmp_path, gradient_clipping=0.0, **more)
    engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
    before = weights(engine)
    batch = batches(1)[0]
    for output in ("loss", "logits"):  # a loss of the script's own starts at the logits
        with pytest.raises(UsageError, match=r"engine\.scale\(loss\)"):
            engine(input_ids=batch, labels=batch)[output].float().mean().backward()
    assert all(torch.equal(weights(engine)[name], tensor) for name, tensor in before.items())
    engine.destroy()


def test_scale_multiplies_the_loss_as_backward_does_in_fp16(tmp_path):
    curves = []
    for how in BACKWARDS:
        config = configuration(tmp_path, fp16={"enabled": True, "initial_scale_power": 8})
        engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
        losses = []
        for batch in batches(2):
            loss = engine(input_ids=batch, labels=batch).loss
            BACKWARDS[how](engine, loss)
            engine.step()
            losses.append(loss.item())
        curves.append(losses)
        engine.destroy()
    assert curves[0] == curves[1]


def test_a_change_of_gathered_parameters_after_initialize_is_refused_not_lost(tmp_path):
    engine, *_ = deepspeed.initialize(model=build("llama"), config=configuration(tmp_path))
    before = weights(engine)
    weight = engine.module.model.layers[1].mlp.up_proj.weight
    with pytest.raises(UsageError, match=r"before deepspeed\.initialize"):
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.data.zero_()
    batch = batches(1)[0]
    with deepspeed.zero.GatheredParameters([weight]):
        assert torch.equal(weight.data, before["model.layers.1.mlp.up_proj.weight"])
        engine.backward(engine(input_ids=batch, labels=batch).loss)  # fetches it in the meantime
    engine.step()
    assert not torch.equal(
        weights(engine)["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"]
    )
    engine.destroy()
    with deepspeed.zero.GatheredParameters([weight], enabled=False):
        pass


def test_what_has_no_counterpart_says_what_to_do(tmp_path):
    engine, *_ = deepspeed.initialize(model=build("llama"), config=configuration(tmp_path, "none"))
    with pytest.raises(UsageError, match="PipelineModule"):
        engine.train_batch(data_iter=iter([]))
    with pytest.raises(UsageError, match="compile_blocks"):
        engine.compile()
    engine.destroy()
    for name in ("pipe", "init_inference", "checkpointing", "monitor", "something"):
        with pytest.raises(AttributeError, match=rf"offload\.deepspeed has no {name}"):
            getattr(deepspeed, name)
    parameters = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(ConfigError, match="amsgrad"):
        deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, amsgrad=True)
    with pytest.raises(ConfigError, match="fp32_optimizer_states"):
        deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, fp32_optimizer_states=False)
    assert type(deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=False)) is torch.optim.Adam
    assert type(deepspeed.ops.adam.FusedAdam(parameters)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from offload.deepspeed.utils import safe_get_full_fp32_param", "GatheredParameters"),
        (
            "from offload.deepspeed.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint",
            r"offload\.export",
        ),
        ("from offload.deepspeed.runtime.lr_schedules import WarmupLR", '"scheduler" of the configuration'),
        ("from offload.deepspeed.ops.lamb import FusedLamb", r"optimizers\.md"),
        ("from offload.deepspeed.utils import groups", "GatheredParameters"),
        ("from offload.deepspeed import pipe", "plain module"),
        ("import offload.deepspeed.something", "it has .*initialize"),
    ],
)
def test_an_import_that_has_no_counterpart_says_what_to_do(line, said):
    with pytest.raises(ImportError, match=said):
        exec(line, {})


def test_collectives_of_one_process_leave_what_a_script_logs_as_it_is():
    comm = deepspeed.comm
    loss = torch.tensor([1.5, 2.0])
    comm.all_reduce(loss, op=comm.ReduceOp.SUM)
    comm.reduce(loss, dst=0)
    gathered = [torch.zeros(2) for _ in range(comm.get_world_size())]
    comm.all_gather(gathered, loss)
    assert torch.equal(gathered[0], torch.tensor([1.5, 2.0]))
    whole = torch.zeros(1, 2)
    comm.all_gather_into_tensor(whole, loss)
    assert torch.equal(whole[0], loss)
    objects = [None]
    comm.all_gather_object(objects, {"seen": 3})
    comm.broadcast_object_list(objects, src=0)
    assert objects == [{"seen": 3}]
    with pytest.raises(
        AttributeError, match="comm has no all_to_all_single: in one process every tensor is whole"
    ):
        comm.all_to_all_single  # noqa: B018


def test_what_neither_engine_nor_module_has_is_said_of_both(tmp_path):
    engine, *_ = deepspeed.initialize(model=build("llama"), config=configuration(tmp_path))
    assert engine.num_parameters() == engine.module.num_parameters()
    with pytest.raises(
        AttributeError, match="neither this library's DeepSpeedEngine nor LlamaForCausalLM has 'monitor': log"
    ):
        engine.monitor  # noqa: B018
    assert not hasattr(engine, "monitor")
    engine.destroy()


def test_steps_per_print_may_be_the_infinity_that_accelerate_writes_for_never(tmp_path):
    config = configuration(tmp_path, steps_per_print=float("inf"))
    engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
    for batch in batches(2):
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
    assert engine.global_steps == 2
    engine.destroy()


def test_parameters_that_no_group_has_are_named_before_anything_moves(tmp_path):
    model = build("llama")
    some = [p for name, p in model.named_parameters() if "layers.0" not in name]
    with pytest.raises(
        ConfigError, match=r"9 trainable parameters are in no group.*layers\.0\.self_attn\.q_proj.* first"
    ):
        deepspeed.initialize(model=model, model_parameters=some, config=configuration(tmp_path))
    model.model.layers[0].requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=some, config=configuration(tmp_path))
    engine.destroy()


def test_a_schedule_that_is_refused_leaves_the_model_to_try_again_with(tmp_path):
    model, scheduler = build("llama"), {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}
    with pytest.raises(ConfigError, match="warmup_num_steps=0: must be a whole number of at least 1"):
        deepspeed.initialize(model=model, config=configuration(tmp_path, scheduler=scheduler))
    scheduler["params"]["warmup_num_steps"] = 2
    engine, *_ = deepspeed.initialize(model=model, config=configuration(tmp_path, scheduler=scheduler))
    engine.destroy()

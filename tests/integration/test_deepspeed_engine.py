"""Loops written for DeepSpeed's engine train as plain torch in memory does, wherever the state is put."""

import copy
import functools
import json
import logging
import math

import pytest
import torch

import offload
import offload.deepspeed as deepspeed
from offload.errors import ConfigError, UsageError
from tests.conftest import batches, build, slow_but
from tests.drive_order import recorded

LR = 2e-3
SMALL = {
    "chunk_elements": 4096,
    "prefetch_blocks": 1,
}  # several chunks a block, little staging, no block that stays


def configuration(tmp_path, where="nvme", **more):
    device = (
        {"device": where} if where != "nvme" else {"device": "nvme", "nvme_path": str(tmp_path / "store")}
    )
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "zero_optimization": {"stage": 3, "offload_optimizer": device, "offload_param": {**device}},
        "offload": SMALL,
        **more,
    }


def weights(engine):
    return {name: t.float().clone() for block in engine.offload.iter_blocks() for name, t in block}


def train(config, n_steps=6, dtype=torch.float32, accumulate=1, module=None, **given):
    """(losses, parameters) of a loop as DeepSpeed's users write it; the engine is closed."""
    model = build("llama", dtype) if module is None else module
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, **given
    )
    losses = []
    for whole in batches(n_steps, batch=4 * accumulate):
        for part in whole.chunk(accumulate):
            loss = engine(input_ids=part, labels=part).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    assert engine.global_steps == n_steps
    after = weights(engine)
    engine.destroy()
    return losses, after


def in_memory(n_steps=6, accumulate=1, clip=1.0, rates=None, dtype=torch.float32):
    """The same with torch alone."""
    model = build("llama", dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    losses, norms = [], []
    for step, whole in enumerate(batches(n_steps, batch=4 * accumulate)):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[step]
        for part in whole.chunk(accumulate):
            loss = model(input_ids=part, labels=part).loss
            (loss / accumulate).backward()
            losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, {n: p.detach().float() for n, p in model.named_parameters()}, norms


in_memory_once = functools.cache(in_memory)


# AdamW's first steps move a parameter by about lr whatever the gradient's size: see test_exactness.
BOUND = 0.02 * LR


def assert_near(got, expected, bound=BOUND):
    assert got[0] == pytest.approx(expected[0], abs=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert (got[1][name] - tensor).abs().max() <= bound, name


@pytest.mark.parametrize("where", slow_but(["nvme"], ["none", "cpu", "nvme"]))
@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({}, {}),
        ({"gradient_clipping": 0.0}, {"clip": None}),
        ({"gradient_clipping": 0.05}, {"clip": 0.05}),
        ({"gradient_accumulation_steps": 3}, {"accumulate": 3}),
        ({"gradient_accumulation_steps": 2, "gradient_clipping": 0.0}, {"accumulate": 2, "clip": None}),
    ],
    ids=["default", "no clipping", "clipping", "accumulation", "accumulation without clipping"],
)
def test_fp32_training_is_that_of_torch_in_memory(tmp_path, where, more, options):
    got = train(configuration(tmp_path, where, **more), accumulate=options.get("accumulate", 1))
    losses, after, _ = in_memory_once(**options)
    assert_near(got, (losses, after))


def test_placement_does_not_change_a_bit(tmp_path):
    results = [
        train(configuration(tmp_path, where, bf16={"enabled": True}), dtype=torch.float32)
        for where in ("none", "cpu", "nvme")
    ]
    for losses, after in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(after[name], tensor) for name, tensor in results[0][1].items())


def test_bf16_keeps_the_fp32_values_it_was_given_as_masters(tmp_path):
    """A learning rate that bf16 would round away still moves the parameters, as it does in fp32."""
    config = configuration(tmp_path, bf16={"enabled": True})
    config["optimizer"]["params"] = {"lr": 1e-6}
    before = {
        name: p.detach().to(torch.bfloat16).float() for name, p in build("llama", layers=2).named_parameters()
    }
    _, after = train(config, n_steps=100, module=build("llama", layers=2))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (after[name] != before[name]).float().mean() > 0.05


def test_bf16_losses_stay_within_bf16_noise_of_fp32(tmp_path):
    losses, _ = train(configuration(tmp_path, bf16={"enabled": True}), n_steps=12)
    expected, _, _ = in_memory(n_steps=12)
    assert losses == pytest.approx(expected, abs=0.02)


def test_fp16_is_autocast_with_loss_scaling(tmp_path):
    """The oracle is torch.autocast with the loss scaled by hand, in memory."""
    fp16 = {"enabled": True, "initial_scale_power": 8}
    losses, after = train(configuration(tmp_path, fp16=fp16))
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    expected = []
    for batch in batches(6):
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=batch, labels=batch).loss
        (loss * 256).backward()
        for parameter in model.parameters():
            parameter.grad /= 256
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=2e-4)
    far = {n: ((after[n] - p.detach()).abs() > BOUND).flatten() for n, p in model.named_parameters()}
    for name, beyond in far.items():  # fp16 rounds a few gradients to another sign: one, where there are few
        assert beyond.sum() <= max(1, 0.005 * beyond.numel()), name
    assert torch.cat(list(far.values())).float().mean() < 0.002


def test_an_overflow_skips_the_step_and_lowers_the_scale(tmp_path):
    """At a scale of 2^40 the gradients overflow fp16: nothing moves, the schedule waits, the scale halves."""
    config = configuration(tmp_path, fp16={"enabled": True, "initial_scale_power": 40, "hysteresis": 1})
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 4}}
    model = build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    batch = batches(1)[0]
    applied, scales = [], []
    for _ in range(40):
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        applied.append(engine.was_step_applied())
        scales.append(engine.cur_scale)
        if not any(applied):
            assert all(torch.equal(t, before[name]) for name, t in weights(engine).items())
            assert engine.lr_scheduler.last_batch_iteration == -1
            assert not math.isfinite(engine.get_global_grad_norm())
        if sum(applied) == 3:
            break
    n_skipped = applied.index(True)
    assert n_skipped >= 3
    assert engine.skipped_steps == n_skipped
    assert scales[: n_skipped + 1] == [2.0**40 / 2 ** min(i + 1, n_skipped) for i in range(n_skipped + 1)]
    assert engine.lr_scheduler.last_batch_iteration == 2
    assert any(not torch.equal(t, before[name]) for name, t in weights(engine).items())
    engine.destroy()


def test_bf16_gradients_that_are_not_finite_skip_the_step(tmp_path):
    model = build("llama", torch.bfloat16)
    engine, *_ = deepspeed.initialize(
        model=model, config=configuration(tmp_path, bf16={"enabled": True}, gradient_clipping=0.0)
    )
    before = weights(engine)
    good = batches(1)[0]
    loss = engine(input_ids=good, labels=good).loss
    engine.backward(loss * math.inf)
    engine.step()
    assert (engine.skipped_steps, engine.global_steps) == (1, 1)
    assert all(torch.equal(t, before[name]) for name, t in weights(engine).items())
    engine.backward(engine(input_ids=good, labels=good).loss)
    engine.step()
    assert (engine.skipped_steps, engine.global_steps) == (1, 2)
    assert all(bool(torch.isfinite(t).all()) for t in weights(engine).values())
    engine.destroy()


def test_the_norm_is_that_before_clipping(tmp_path):
    engine, *_ = deepspeed.initialize(
        model=build("llama"), config=configuration(tmp_path, gradient_clipping=0.05)
    )
    _, _, expected = in_memory(n_steps=3, clip=0.05)
    found = []
    for batch in batches(3):
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
        found.append(engine.get_global_grad_norm())
    assert found == pytest.approx(expected, rel=1e-4)
    engine.destroy()


def test_a_schedule_moves_the_rates_of_every_step(tmp_path):
    config = configuration(tmp_path)
    config["scheduler"] = {
        "type": "WarmupDecayLR",
        "params": {"warmup_max_lr": LR, "warmup_num_steps": 2, "total_num_steps": 6, "warmup_type": "linear"},
    }
    rates = [LR * share for share in (0, 0, 0.5, 1, 0.75, 0.5)]
    losses, after, _ = in_memory(rates=rates)
    assert_near(train(config), (losses, after))


@pytest.mark.parametrize("given", ["object", "callable"])
def test_a_clients_optimizer_and_schedule_are_used(tmp_path, given):
    model = build("llama")
    config = configuration(tmp_path)
    del config["optimizer"]

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)

    def schedule(over):
        return torch.optim.lr_scheduler.LambdaLR(over, lambda step: 1 / (1 + step))

    if given == "object":
        mine = optimizer(model.parameters())
        options = {"optimizer": mine, "lr_scheduler": schedule(mine)}
    else:
        options = {"optimizer": optimizer, "lr_scheduler": schedule}
    losses, after, _ = in_memory(rates=[LR / (1 + step) for step in range(6)])
    assert_near(train(config, module=model, **options), (losses, after))


def test_parameter_groups_are_kept(tmp_path):
    model = build("llama")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, config=configuration(tmp_path)
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert engine.get_lr() == [LR, LR]
    assert engine.get_mom() == [(0.9, 0.95), (0.9, 0.95)]
    engine.destroy()


def micro_step(engine, part):
    loss = engine(input_ids=part, labels=part).loss
    engine.backward(loss)
    return loss.item()


def test_boundaries_that_the_caller_sets(tmp_path):
    engine, *_ = deepspeed.initialize(
        model=build("llama"), config=configuration(tmp_path, gradient_accumulation_steps=3)
    )
    for whole in batches(6, batch=12):
        for number, part in enumerate(whole.chunk(3)):
            engine.set_gradient_accumulation_boundary(number == 2)
            micro_step(engine, part)
        engine.step()
    after = weights(engine)
    engine.destroy()
    _, expected, _ = in_memory(accumulate=3)
    assert all((after[name] - tensor).abs().max() <= BOUND for name, tensor in expected.items())


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_accumulation_that_the_caller_owns(tmp_path, clip):
    """managed_gradient_accumulation=false: every step() updates with what has been accumulated, however much."""
    config = configuration(
        tmp_path, gradient_accumulation_steps=3, managed_gradient_accumulation=False, gradient_clipping=clip
    )
    engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
    for whole in batches(6, batch=12):
        for part in whole.chunk(3):
            micro_step(engine, part)
        assert not engine.is_gradient_accumulation_boundary()
        engine.step()
    assert (engine.global_steps, engine.global_samples) == (6, 72)
    after = weights(engine)
    engine.destroy()
    _, expected, _ = in_memory(accumulate=3, clip=clip or None)
    assert all((after[name] - tensor).abs().max() <= BOUND for name, tensor in expected.items())


def test_counters_and_boundaries_of_managed_accumulation(tmp_path):
    engine, *_ = deepspeed.initialize(
        model=build("llama"), config=configuration(tmp_path, "none", gradient_accumulation_steps=2)
    )
    part = batches(1)[0]
    boundaries, applied = [], []
    for _ in range(4):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        micro_step(engine, part)
        engine.step()
        applied.append(engine.was_step_applied())
    assert boundaries == applied == [False, True, False, True]
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (4, 2, 16)
    assert engine.get_batch_info() == (8, 4, 2)
    engine.set_train_batch_size(12)
    assert engine.gradient_accumulation_steps() == 3
    engine.destroy()


def test_backward_gives_the_loss_of_its_share(tmp_path):
    engine, *_ = deepspeed.initialize(
        model=build("llama"), config=configuration(tmp_path, "none", gradient_accumulation_steps=2)
    )
    part = batches(1)[0]
    loss = engine(input_ids=part, labels=part).loss
    assert engine.backward(loss).item() == pytest.approx(loss.item() / 2)
    engine.destroy()


def test_training_data_comes_in_deepspeeds_order(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in batches(1, batch=12)[0]]
    engine, _, loader, _ = deepspeed.initialize(
        model=build("llama"), config=configuration(tmp_path, "none"), training_data=data
    )
    sampler = torch.utils.data.DistributedSampler(range(12), num_replicas=1, rank=0)
    expected = [data[i]["input_ids"] for i in sampler]
    found = [row for batch in loader for row in batch["input_ids"]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert loader is engine.training_dataloader
    engine.destroy()


def test_evaluation_without_gradients(tmp_path):
    engine, *_ = deepspeed.initialize(model=build("llama"), config=configuration(tmp_path))
    batch = batches(1)[0]
    engine.eval()
    with torch.no_grad():
        found = engine(input_ids=batch, labels=batch).loss.item()
    assert not engine.module.training
    engine.train()
    assert engine.module.training
    expected = build("llama")(input_ids=batch, labels=batch).loss.item()
    assert found == pytest.approx(expected, abs=1e-6)
    engine.destroy()


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("tie", [False, True])
def test_16_bit_weights_load_into_the_model(tmp_path, file_name, tie):
    from safetensors.torch import load_file

    model = build("llama", tie=tie)
    engine, *_ = deepspeed.initialize(model=model, config=configuration(tmp_path, bf16={"enabled": True}))
    micro_step(engine, batches(1)[0])
    engine.step()
    assert engine.save_16bit_model(str(tmp_path / "out"), file_name) is True
    expected = weights(engine)
    state = engine.module_state_dict()
    engine.destroy()
    path = tmp_path / "out" / file_name
    assert sorted(p.name for p in path.parent.iterdir()) == [file_name]
    saved = load_file(path) if file_name.endswith("safetensors") else torch.load(path, weights_only=True)
    assert all(torch.equal(saved[name].float(), tensor) for name, tensor in expected.items())
    fresh = build("llama", torch.bfloat16, seed=5, tie=tie)
    if file_name.endswith("bin"):
        fresh.load_state_dict(saved)
        assert all(torch.equal(p.float(), expected[name]) for name, p in fresh.named_parameters())
        assert saved.keys() == state.keys() == fresh.state_dict().keys()


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "model.safetensors"])
def test_16_bit_weights_are_on_the_drive_before_they_get_their_name(tmp_path, monkeypatch, file_name):
    engine, *_ = deepspeed.initialize(model=build("llama"), config=configuration(tmp_path))
    done = recorded(monkeypatch)
    engine.save_16bit_model(str(tmp_path / "out"), file_name)
    engine.destroy()
    partial = f"{file_name}.partial"
    assert done[-3:] == [("sync", partial), ("rename", partial), ("sync", "out")]


def test_the_section_offload_sets_budgets(tmp_path):
    config = configuration(tmp_path)
    config["offload"] = {**SMALL, "host_memory": "1GB", "micro_batches": 2, "blocks": "LlamaDecoderLayer"}
    engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
    assert all(engine.offload.placement.params_in_host)
    assert engine.offload.placement.storage_nbytes == 0
    assert engine.offload.micro_batches == 2
    engine.destroy()
    config["offload"] = {**SMALL, "blocks": "LlamaMLP"}
    engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
    assert [block.name for block in engine.offload.blocks] == [f"model.layers.{i}.mlp" for i in range(4)]
    engine.destroy()
    config["offload"] = {"host_memry": "1GB"}
    with pytest.raises(ConfigError, match="host_memry"):
        deepspeed.initialize(model=build("llama"), config=config)


def test_a_configuration_from_the_command_line(tmp_path):
    import argparse

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(configuration(tmp_path, "none")))
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    engine, *_ = deepspeed.initialize(args=args, model=build("llama"))
    assert engine.zero_optimization_stage() == 3
    engine.destroy()


def test_progress_is_logged_every_so_many_steps(tmp_path, caplog):
    config = configuration(tmp_path, steps_per_print=2, wall_clock_breakdown=True)
    with caplog.at_level(logging.INFO, "offload"):
        train(config, n_steps=4)
    assert "step=2, skipped=0" in caplog.text
    assert "step=3, skipped" not in caplog.text
    assert caplog.text.count("waited:") == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, b: e.backward(torch.zeros(3, requires_grad=True)), "scalar"),
        (lambda e, b: e.backward(torch.zeros(())), "requires a gradient"),
        (lambda e, b: e.backward(e(input_ids=b, labels=b).loss, retain_graph=True), "retain_graph"),
    ],
)
def test_misuse_is_refused(tmp_path, call, message):
    engine, *_ = deepspeed.initialize(model=build("llama"), config=configuration(tmp_path, "none"))
    with pytest.raises(UsageError, match=message):
        call(engine, batches(1)[0])
    engine.destroy()


def test_a_model_that_cannot_fit_is_refused_before_anything_is_written(tmp_path):
    config = configuration(tmp_path)
    config["offload"] = {**SMALL, "device_memory": "100KB"}
    with pytest.raises(offload.BudgetError):
        deepspeed.initialize(model=build("llama"), config=copy.deepcopy(config))
    assert not list((tmp_path / "store").glob("*")) if (tmp_path / "store").exists() else True


def test_a_frozen_reference_needs_no_optimizer_and_nothing_is_said_of_clipping(tmp_path, caplog):
    batch = batches(1)[0]
    plain, model = (build("llama").requires_grad_(False) for _ in range(2))
    config = configuration(tmp_path)
    del config["optimizer"]
    engine, *_ = deepspeed.initialize(model=model, config=config)
    with torch.no_grad():
        assert torch.equal(
            engine(input_ids=batch, labels=batch).loss, plain(input_ids=batch, labels=batch).loss
        )
    assert "clipped" not in caplog.text
    engine.destroy()
    with pytest.raises(ConfigError, match=r"no optimizer.*requires_grad_\(False\)"):
        deepspeed.initialize(model=build("llama"), config=config)

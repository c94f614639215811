"""Reading a DeepSpeed configuration: sources, older spellings, "auto", batch sizes, and what it means here."""

import base64
import json
import logging
import math
import types

import pytest
import torch

from offload.deepspeed import config, mapping
from offload.errors import ConfigError


def test_a_file_a_dict_and_base64_give_the_same(tmp_path):
    wanted = {"train_batch_size": 4, "zero_optimization": {"stage": 3}}
    (tmp_path / "ds.json").write_text(json.dumps(wanted))
    assert config.load(wanted) == wanted
    assert config.load(str(tmp_path / "ds.json")) == wanted
    assert config.load(tmp_path / "ds.json") == wanted
    assert config.load(base64.urlsafe_b64encode(json.dumps(wanted).encode()).decode()) == wanted


def test_the_given_dict_is_left_as_it_is():
    given = {"train_batch_size": "auto", "zero_optimization": {"stage": 3, "cpu_offload": True}}
    before = json.dumps(given)
    config.read(given)
    assert json.dumps(given) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": 1, "a": 2}', "stands there twice"), ("{", "not JSON"), ("[1]", "a JSON object is needed")],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(str(tmp_path / "ds.json"))
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(str(tmp_path / "missing.json"))


def test_older_spellings_are_read_with_a_warning(caplog):
    read = {
        "bfloat16": {"enabled": True},
        "aio": {"thread_count": 4},
        "zero_optimization": {
            "stage": 3,
            "cpu_offload": True,
            "cpu_offload_params": True,
            "stage3_gather_fp16_weights_on_model_save": True,
            "prefetch_bucket_size": 7,
        },
    }
    with caplog.at_level(logging.WARNING, "offload"):
        config.modernise(read)
    assert read == {
        "bf16": {"enabled": True},
        "aio": {"intra_op_parallelism": 4},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_prefetch_bucket_size": 7,
        },
    }
    assert "aio.thread_count is an older spelling; reading it as aio.intra_op_parallelism" in caplog.text
    assert caplog.text.count("older spelling") == 6


def test_a_boolean_zero_optimization_is_a_stage():
    read = {"zero_optimization": True}
    config.modernise(read)
    assert read == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((8, 2, 4), (8, 2, 4)),
        ((8, 2, None), (8, 2, 4)),
        ((8, None, 4), (8, 2, 4)),
        ((None, 2, 4), (8, 2, 4)),
        ((8, None, None), (8, 8, 1)),
        ((None, 2, None), (2, 2, 1)),
    ],
)
def test_two_batch_sizes_give_the_third(given, expected):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    read = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    assert config.batch_sizes(read) == expected


@pytest.mark.parametrize(
    "read",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2},
        {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
        {"train_batch_size": 0},
        {"train_batch_size": 2.5},
        {"train_batch_size": True},
    ],
)
def test_batch_sizes_that_do_not_agree_are_refused(read):
    with pytest.raises(ConfigError):
        config.batch_sizes(read)


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}
MODEL = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=100))


def test_auto_becomes_what_the_trainers_arguments_say(tmp_path):
    """The oracle is `transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig`, which needs DeepSpeed; its rules
    are retyped here, and its arguments are the real ones."""
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_grad_norm=0.7,
        learning_rate=2e-4,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.03,
        max_steps=40,
        warmup_steps=6,
        bf16=True,
        use_cpu=True,
    )
    read = config.load(AUTO)
    config.resolve_auto(read, args, MODEL)
    assert read == {
        "train_batch_size": 15,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.7,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.03},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": 0,
                "warmup_max_lr": 2e-4,
                "warmup_num_steps": 6,
                "total_num_steps": 40,
            },
        },
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 10000,
            "stage3_prefetch_bucket_size": 9000,
            "stage3_param_persistence_threshold": 1000,
        },
    }


def test_auto_without_arguments_is_the_trainers_default():
    read = config.load(AUTO)
    config.resolve_auto(read, None, MODEL, n_samples=80)
    assert read["train_micro_batch_size_per_gpu"] == read["train_batch_size"] == 8
    assert read["gradient_clipping"] == 1.0
    assert read["optimizer"]["params"] == {
        "lr": 5e-5,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
    }
    assert read["scheduler"]["params"]["total_num_steps"] == 3 * 80 // 8
    assert read["scheduler"]["params"]["warmup_num_steps"] == 1


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ({"steps_per_print": "auto"}, "does not fill"),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": "auto"}}}, "does not fill"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}, "number of steps"),
    ],
)
def test_an_auto_that_nobody_can_fill_is_refused(read, message):
    with pytest.raises(ConfigError, match=message):
        config.resolve_auto(read, None, None)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 4}, "stage"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "needs stage 3"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "needs stage 1"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "nvme_path"),
        ({"stage": 3, "offload_optimizer": {"device": "gpu"}}, "device"),
    ],
)
def test_offloading_that_deepspeed_would_not_accept_is_refused(zero, message):
    with pytest.raises(ConfigError, match=message):
        mapping.offloading({"zero_optimization": zero})


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ({}, {"max_grad_norm": 1.0}),
        ({"gradient_clipping": 0.3}, {"max_grad_norm": 0.3}),
        ({"gradient_clipping": 0.0}, {}),
        ({"gradient_clipping": 0.0, "bf16": {"enabled": True}}, {"max_grad_norm": math.inf}),
        ({"gradient_clipping": 0.0, "bf16": {"enabled": True, "check_grad_overflow": False}}, {}),
        ({"gradient_clipping": 0.0, "fp16": {"enabled": True}}, {"max_grad_norm": math.inf}),
        ({"gradient_clipping": 0.0, "managed_gradient_accumulation": False}, {"update": "deferred"}),
    ],
)
def test_updates_wait_only_for_what_needs_every_gradient(read, expected):
    assert mapping.max_grad_norm_settings(read) == expected


def test_the_optimizer_has_deepspeeds_meanings_and_defaults():
    parameters = [torch.nn.Parameter(torch.zeros(3))]

    def made(name, **params):
        return mapping.make_optimizer({"optimizer": {"type": name, "params": params}}, parameters)

    adam = made("Adam", lr=0.1)
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.defaults["weight_decay"] == 0.0
    assert type(made("Adam", adam_w_mode=False, weight_decay=0.1)) is torch.optim.Adam
    assert isinstance(made("adamw", adam_w_mode=False), torch.optim.AdamW)
    assert made("AdamW", torch_adam=True).defaults["weight_decay"] == 0.01
    assert made("AdamW", betas=[0.8, 0.9]).defaults["betas"] == (0.8, 0.9)
    lion = made("Lion", lr=0.1, betas=[0.9, 0.98], weight_decay=0.2)
    assert type(lion).__name__ == "Lion"
    assert (lion.defaults["betas"], lion.defaults["weight_decay"]) == ((0.9, 0.98), 0.2)
    assert made("SGD", lr=0.1, momentum=0.9, nesterov=True).defaults["nesterov"] is True
    assert isinstance(made("Adafactor", lr=0.01), torch.optim.Adafactor)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "Lamb", "params": {}}, "Lamb"),
        ({"type": "AdamW", "params": {"max_grad_norm": 1.0}}, "gradient_clipping"),
        ({"type": "AdamW", "params": {"momentum": 0.9}}, "momentum"),
        ({"type": "SGD", "params": {"lr": 0.1, "betas": [0.9, 0.99]}}, "betas: not a parameter of SGD"),
        (
            {"type": "AdamW", "params": {"lr": "1e-3"}},
            r"optimizer.params=.*'1e-3'.*AdamW does not take these",
        ),
        ({"type": "AdamW", "params": {"lr": -1.0}}, "AdamW does not take these: Invalid learning rate"),
        ({"type": "AdamW", "params": {"amsgrad": True}}, "amsgrad"),
        (None, "no optimizer"),
    ],
)
def test_an_optimizer_that_is_not_ours_is_refused(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        mapping.make_optimizer({"optimizer": optimizer}, [torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize(
    "name", ["reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"]
)
def test_auto_where_a_key_has_no_effect_needs_nothing_of_the_model(name):
    given = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3, name: "auto"}}
    resolved = config.read(given)
    config.resolve_auto(resolved, model=types.SimpleNamespace())
    assert name not in resolved["zero_optimization"]  # as DeepSpeed leaves out what stays "auto"

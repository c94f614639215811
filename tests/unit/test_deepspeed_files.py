"""DeepSpeed files as repositories have them are read, and mean what DeepSpeed takes them to mean.

`MEANINGS` has the shapes that were found in public repositories (fine-tuning recipes of Alpaca's and LLaVA's kind,
LLaMA-Factory, axolotl, OpenRLHF, openfold, tutorials), and what DeepSpeed 0.19.8's own reader makes of each;
tests/peers asks that reader again where DeepSpeed is installed.
"""

from __future__ import annotations

import base64
import logging
import sys

import pytest

from offload.deepspeed import config, mapping
from offload.deepspeed.loss_scale import from_config
from offload.errors import ConfigError

BASE = {"train_micro_batch_size_per_gpu": 4}

# what it is: (in the file, what DeepSpeed's reader has)
MEANINGS = {
    "words for switches": (
        {"fp16": {"enabled": "false"}, "bf16": {"enabled": "true"}},
        {"fp16": False, "bf16": True},
    ),
    "a word that turns off offloading": (
        {"zero_optimization": {"stage": 2, "cpu_offload": "false"}},
        {"stage": 2, "states": "none"},
    ),
    "words for numbers": (
        {
            "zero_optimization": {"stage": "3"},
            "fp16": {"enabled": True, "loss_scale": "128", "initial_scale_power": "12"},
        },
        {"stage": 3, "fp16": True, "loss_scale": 128.0},
    ),
    "fractions for whole numbers": (
        {"zero_optimization": {"stage": 2.0}, "gradient_accumulation_steps": 2.0, "steps_per_print": 1e5},
        {"stage": 2, "batch": (8, 4, 2)},
    ),
    "auto where only DeepSpeed's default can be meant": (  # OpenRLHF
        {
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "auto", "buffer_size": "auto", "pin_memory": "auto"},
                "offload_optimizer": {"device": "cpu"},
                "sub_group_size": "auto",
                "stage3_max_live_parameters": "auto",
                "stage3_max_reuse_distance": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "reduce_bucket_size": "auto",
            },
            "fp16": {"enabled": True, "initial_scale_power": "auto", "loss_scale": "auto"},
        },
        {"stage": 3, "states": "cpu", "params": "none", "fp16": True, "loss_scale": 2.0**16},
    ),
    "auto as a stage": ({"zero_optimization": {"stage": "auto"}}, {"stage": 0}),
    "auto in an older spelling": (
        {"zero_optimization": {"stage": 2, "cpu_offload": "auto"}},
        {"stage": 2, "states": "none"},
    ),
    "offload_param below stage 3": (  # trlx, accelerate's recipes
        {
            "zero_optimization": {
                "stage": 2,
                "offload_param": {"device": "cpu", "pin_memory": True},
                "offload_optimizer": {"device": "cpu"},
            }
        },
        {"stage": 2, "states": "cpu"},
    ),
    "a comment, a field for one, and settings of other programs": (
        {"_read_the_docs": "https://www.deepspeed.ai", "//": "mine", "output_dir": "runs", "seed": 3},
        {"batch": (4, 4, 1)},
    ),
    "sections that DeepSpeed passes over": (  # LLaMA-Factory
        {"comms_config": {"verbose": False}, "monitor_config": {"enabled": True, "tag": "t"}},
        {"batch": (4, 4, 1)},
    ),
    "a switch that activation checkpointing does not have": (
        {"activation_checkpointing": {"enabled": True, "cpu_checkpointing": False}},
        {"cpu_checkpointing": False},
    ),
    "nulls": (
        {
            "gradient_accumulation_steps": None,
            "steps_per_print": None,
            "zero_optimization": {"stage": 3, "offload_param": None, "offload_optimizer": None},
            "activation_checkpointing": {"number_checkpoints": None},
            "optimizer": {"type": "Adam", "params": None},
        },
        {"stage": 3, "states": "none", "params": "none", "batch": (4, 4, 1)},
    ),
    "older spellings": (  # openfold, Lightning's documentation
        {
            "bfloat16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "cpu_offload": True,
                "cpu_offload_param": True,
                "stage3_gather_fp16_weights_on_model_save": True,
            },
        },
        {"stage": 3, "bf16": True, "states": "cpu", "params": "cpu"},
    ),
}

# What DeepSpeed 0.19 has begun to refuse, and older releases, for which these files were written, did not.
MEANT_BEFORE = {
    "loss scaling beside bf16": (  # LLaMA-Factory, ChatGLM
        {
            "bf16": {
                "enabled": True,
                "auto_cast": False,
                "loss_scale": 0,
                "initial_scale_power": 16,
                "loss_scale_window": 1000,
                "hysteresis": 2,
                "min_loss_scale": 1,
            }
        },
        {"bf16": True, "fp16": False, "loss_scale": 1.0},
    ),
    "apex, off": ({"amp": {"enabled": False, "opt_level": "O2"}}, {"fp16": False}),
    "apex, as the Trainer decides": ({"amp": {"enabled": "auto", "opt_level": "auto"}}, {"fp16": False}),
    "apex beside fp16": ({"fp16": {"enabled": True, "opt_level": "O1"}}, {"fp16": True}),
    "elasticity, off": (
        {"elasticity": {"enabled": False, "max_train_batch_size": 16, "micro_batch_size": 1}},
        {"batch": (4, 4, 1)},
    ),
}


def meaning(read):
    """What this library takes a configuration to mean, by the names of `MEANINGS`."""
    offloading = mapping.offloading(read)
    return {
        "stage": config.get(read, "zero_optimization.stage", 0),
        "states": offloading.states,
        "params": offloading.params,
        "fp16": mapping.is_fp16(read),
        "bf16": bool(config.get(read, "bf16.enabled", False)),
        "loss_scale": from_config(read, is_fp16=mapping.is_fp16(read)).scale,
        "batch": config.batch_sizes(read),
        "cpu_checkpointing": mapping.wrap_settings(read).get("activations") == "host",
    }


@pytest.mark.parametrize("name", [*MEANINGS, *MEANT_BEFORE])
def test_a_file_that_deepspeed_accepts_means_the_same(name, monkeypatch):
    monkeypatch.setattr(config, "_told", set())
    given, expected = (MEANINGS | MEANT_BEFORE)[name]
    found = meaning(config.read({**BASE, **given}))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp16": {"enabled": "True,"}}, r'fp16\.enabled="True,": must be true or false'),
        ({"fp16": {"loss_scale": "dynamic"}}, r'fp16\.loss_scale="dynamic": must be a number; 0 is'),
        ({"fp16": {"loss_scale": -1}}, r"fp16\.loss_scale=-1: must be at least 0"),
        ({"gradient_clipping": "none"}, r'gradient_clipping="none": must be a number; 0 turns it off'),
        ({"gradient_clipping": float("nan")}, "gradient_clipping=NaN: must be a number"),
        ({"train_batch_size": "many"}, 'train_batch_size="many": must be a whole number'),
        ({"zero_optimization": {"stage": "two"}}, 'stage="two": must be a whole number'),
        ({"aio": {"queue_depth": "1e1"}}, 'queue_depth="1e1": must be a whole number'),
        ({"zero_optimization": {"offload_param": {"pin_memory": "maybe"}}}, "must be true or false"),
        ({"zero_optimization": {"cpu_offload": "maybe"}}, "cpu_offload.*must be true or false"),
        ({"max_grad_norm": 0.5}, "max_grad_norm=0.5 is refused.*gradient_clipping"),
        ({"lr_scheduler": {"type": "WarmupLR"}}, "the section is called `scheduler`"),
        ({"fp8": {"enabled": True}}, "fp8.*delete it"),
        ({"sequence_parallel": {"enabled": True, "size": 4}}, "sequence_parallel.*one process"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp.*delete it"),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1e-5}, "eps": 1e-8}},
            r"optimizer\.eps.*move it into optimizer\.params",
        ),
        ({"aio": {"queue_depth": "auto"}}, r"queue_depth=\"auto\".*write a value"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_write(given, message):
    with pytest.raises(ConfigError, match=message):
        mapping.offloading(config.read({**BASE, **given}))


def test_offloading_to_nvme_below_stage_3_is_refused_not_left_out():
    """As DeepSpeed leaves it out; whoever names a drive means it."""
    zero = {"stage": 2, "offload_param": {"device": "nvme", "nvme_path": "/x"}}
    with pytest.raises(ConfigError, match="needs stage 3"):
        mapping.offloading({"zero_optimization": zero})


def test_what_is_passed_over_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(config, "_told", set())
    with caplog.at_level(logging.WARNING, "offload"):
        for _ in range(2):
            config.judge({"output_dir": "runs", "_comment": "mine"})
    assert caplog.messages == ["output_dir is read by neither DeepSpeed nor this library: it has no effect"]


def test_offload_param_below_stage_3_says_that_it_has_no_effect(caplog):
    mapping.offloading({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}})
    assert "offload_param has no effect at stage 1" in caplog.text
    assert "set stage to 3" in caplog.text


def test_a_file_for_several_processes_says_what_to_write_for_one():
    sizes = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
    }
    with pytest.raises(ConfigError, match=r"for 8 processes.*write gradient_accumulation_steps=32"):
        config.batch_sizes(sizes)
    assert config.batch_sizes({**sizes, "gradient_accumulation_steps": 32}) == (64, 2, 32)


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "ds.json").write_bytes(b'\xef\xbb\xbf{"train_batch_size": 4}')
    assert config.load(tmp_path / "ds.json") == {"train_batch_size": 4}


COMMENTED = """{
  // how much
  "train_batch_size": 4,  # a step
  /* where
     it goes */
  "zero_optimization": {"stage": 3, "note": "// is no comment here", "sub_group_size": 1e9,},
}"""


def test_comments_and_commas_too_many_are_read_as_deepspeed_reads_them(tmp_path):
    pytest.importorskip("hjson", reason="pip install hjson: the library that DeepSpeed reads its files with")
    expected = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 3, "note": "// is no comment here", "sub_group_size": 1e9},
    }
    (tmp_path / "ds.json").write_text(COMMENTED)
    assert config.load(tmp_path / "ds.json") == expected
    assert config.load(base64.urlsafe_b64encode(COMMENTED.encode()).decode()) == expected
    (tmp_path / "ds.json").write_text('{"a": 1, "a": 2, # twice\n}')
    with pytest.raises(ConfigError, match="stands there twice"):
        config.load(tmp_path / "ds.json")
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"not JSON: .* nor Hjson"):
        config.load(tmp_path / "ds.json")


def test_comments_without_the_library_for_them_name_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hjson", None)
    (tmp_path / "ds.json").write_text(COMMENTED)
    with pytest.raises(ConfigError, match=r"not JSON.*line 2.*pip install hjson"):
        config.load(tmp_path / "ds.json")

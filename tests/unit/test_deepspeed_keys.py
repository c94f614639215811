"""Every key of a DeepSpeed configuration has one fate, in one table, which the documentation prints."""

import logging
import pathlib
import re

import pytest

from offload.deepspeed import config, keys
from offload.deepspeed.keys import Fate
from offload.errors import ConfigError

DOCUMENT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "deepspeed.md"
BEGIN, END = "<!-- keys -->\n", "\n<!-- /keys -->"

# As users have them in their files: DeepSpeed 0.19's documentation, docs/_pages/config-json.md.
DOCUMENTED = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
optimizer.type optimizer.params scheduler.type scheduler.params communication_data_type gradient_allreduce_op
prescale_gradients gradient_predivide_factor fp16.enabled fp16.auto_cast fp16.loss_scale
fp16.initial_scale_power fp16.loss_scale_window fp16.hysteresis fp16.consecutive_hysteresis
fp16.min_loss_scale fp16.fp16_master_weights_and_grads bf16.enabled bf16.bf16_master_weights_and_grads
bf16.bf16_optimizer_states bf16.check_grad_overflow torch_autocast.enabled torch_autocast.dtype
torch_autocast.lower_precision_safe_modules gradient_clipping steps_per_print wall_clock_breakdown dump_state
zero_optimization.stage zero_optimization.allgather_partitions zero_optimization.allgather_bucket_size
zero_optimization.compute_grad_norm zero_optimization.overlap_comm zero_optimization.reduce_scatter
zero_optimization.reduce_bucket_size zero_optimization.contiguous_gradients
zero_optimization.load_from_fp32_weights zero_optimization.round_robin_gradients
zero_optimization.parameter_alignment zero_optimization.sub_group_size
zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold
zero_optimization.stage3_gather_16bit_weights_on_model_save
zero_optimization.stage3_module_granularity_threshold zero_optimization.zero_hpz_partition_size
zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_gradients
zero_optimization.log_trace_cache_warnings zero_optimization.cpu_offload
zero_optimization.ignore_unused_parameters zero_optimization.elastic_checkpoint
zero_optimization.zenflow.topk_ratio zero_optimization.offload_param.device
zero_optimization.offload_param.nvme_path zero_optimization.offload_param.pin_memory
zero_optimization.offload_param.buffer_count zero_optimization.offload_param.buffer_size
zero_optimization.offload_param.max_in_cpu zero_optimization.offload_optimizer.device
zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_optimizer.pin_memory
zero_optimization.offload_optimizer.ratio zero_optimization.offload_optimizer.buffer_count
zero_optimization.offload_optimizer.fast_init zero_optimization.offload_optimizer.pipeline_read
zero_optimization.offload_optimizer.pipeline_write zero_optimization.offload_optimizer.super_offload
zero_optimization.offload_optimizer.cpuadam_cores_perc aio.block_size aio.queue_depth aio.thread_count
aio.intra_op_parallelism aio.single_submit aio.overlap_events aio.use_gds tensor_parallel.autotp_size
hybrid_engine.enabled flops_profiler.enabled autotuning.enabled activation_checkpointing.partition_activations
activation_checkpointing.cpu_checkpointing activation_checkpointing.contiguous_memory_optimization
activation_checkpointing.number_checkpoints activation_checkpointing.synchronize_checkpoint_boundary
activation_checkpointing.profile tensorboard.enabled wandb.enabled csv_monitor.enabled comet.enabled
comms_logger.enabled checkpoint.tag_validation checkpoint.load_universal checkpoint.use_node_local_storage
checkpoint.parallel_write.pipeline_stage data_types.grad_accum_dtype data_efficiency.enabled
""".split()  # noqa: SIM905  # a list would fill pages


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(config, "_told", set())


@pytest.mark.parametrize("path", DOCUMENTED)
def test_every_documented_key_has_a_fate(path):
    assert keys.find(keys.OLDER_SPELLINGS.get(path, path)) is not None


def test_no_key_has_two_fates():
    paths = [key.path for key in keys.KEYS]
    assert len(paths) == len(set(paths))
    assert not set(paths) & set(keys.OLDER_SPELLINGS)
    assert all(keys.find(new) or keys.is_section(new) for new in keys.OLDER_SPELLINGS.values())


def test_the_documentation_prints_the_table():
    text = DOCUMENT.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == keys.table(), (
        "run: python -m offload.deepspeed.keys"
    )


@pytest.mark.parametrize("key", keys.KEYS, ids=lambda key: key.path)
def test_every_key_meets_the_fate_that_the_table_names(key, caplog):
    read: dict = {}
    config.put(
        read,
        key.path.replace(".*", ".topk_ratio" if "zenflow" in key.path else ".device_memory"),
        "something",
    )
    with caplog.at_level(logging.INFO, "offload"):
        if key.fate is Fate.REFUSED:
            with pytest.raises(ConfigError) as raised:
                config.judge(read)
            assert key.note in str(raised.value)
        else:
            config.judge(read)
    assert (key.note in caplog.text) == (key.fate is Fate.WITHOUT_EFFECT)


def test_what_has_no_effect_is_told_once(caplog):
    with caplog.at_level(logging.INFO, "offload"):
        for _ in range(3):
            config.judge({"zero_optimization": {"overlap_comm": True}})
    assert caplog.text.count("overlap_comm") == 1


def test_clipping_that_nobody_asked_for_is_told_once_with_the_key_that_changes_it(caplog):
    for _ in range(3):
        config.tell_defaults(config.read({"train_batch_size": 4}))
    told = [record for record in caplog.records if "gradient_clipping" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING]
    assert "clipped at a norm of 1.0" in told[0].getMessage()
    assert "0 for no clipping" in told[0].getMessage()


@pytest.mark.parametrize(
    "asked", [{"gradient_clipping": 1.0}, {"gradient_clipping": 0}, {"offload": {"max_grad_norm": 0.5}}]
)
def test_clipping_that_was_asked_for_is_not_told(caplog, asked):
    config.tell_defaults(config.read({"train_batch_size": 4, **asked}))
    assert "clipped" not in caplog.text


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ({"bf16": True}, r'bf16=true: is a section: write {"bf16": {"enabled": true}}'),
        ({"aio": True}, "aio=true: is a section: write an object"),
        ({"offload": "/mnt/nvme0"}, 'offload="/mnt/nvme0": is a section: write an object'),
    ],
)
def test_a_value_where_a_section_belongs_is_refused_with_what_to_write(read, message):
    """bf16 that is only said to be true would compute in fp32 without a word."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.judge(read)
    config.judge(dict.fromkeys(read, False))


@pytest.mark.parametrize(
    "key", [k for k in keys.KEYS if k.neutral and "*" not in k.path], ids=lambda key: key.path
)
def test_a_refused_key_that_asks_for_nothing_is_accepted(key):
    for value in key.neutral:
        read: dict = {}
        config.put(read, key.path, value)
        config.judge(read)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimization"),
        ({"zero_optimization": {"stge": 3}}, "zero_optimization.stage"),
        (
            {"zero_optimization": {"offload_param": {"nvme_pth": "/x"}}},
            "zero_optimization.offload_param.nvme_path",
        ),
        ({"aio": {"blocksize": 1}}, "aio.block_size"),
        ({"offload_param": {"device": "cpu"}}, "zero_optimization.offload_param"),
        ({"fp16": {"enable": True}}, "fp16.enabled"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(read, expected):
    with pytest.raises(ConfigError, match="did you mean") as raised:
        config.judge(read)
    assert f"did you mean {expected}" in str(raised.value)


@pytest.mark.parametrize(
    "read", [{"aio": {"block_size": 262144}}, {"gradient_clipping": 1.0}, {"fp16": {"enabled": True}}]
)
def test_what_stands_in_a_section_and_belongs_beside_it_is_to_be_moved_out(read):
    """As `aio` does in files that are copied from one another."""
    (name,) = read
    with pytest.raises(ConfigError, match=rf"{name} stands beside zero_optimization, not in it; move it out"):
        config.judge({"zero_optimization": {"stage": 3, **read}})

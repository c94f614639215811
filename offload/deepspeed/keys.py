"""What becomes of every key of DeepSpeed 0.19's training configuration. One table: the reader in `config` follows it
and docs/deepspeed.md prints it (`python -m offload.deepspeed.keys`).

Learned from DeepSpeed 0.19.8: runtime/config.py, runtime/constants.py, runtime/precision_config.py, runtime/zero/*.py,
runtime/swap_tensor/aio_config.py and docs/_pages/config-json.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Fate(enum.Enum):
    """What is done with a key."""

    HONOURED = "honoured"
    WITHOUT_EFFECT = "without effect"
    REFUSED = "refused"


@dataclass(frozen=True)
class Key:
    """`path` is dotted; one that ends in `.*` stands for everything below it.

    `note` says what it does here, why it has no effect, or what to do instead. A refused key is accepted when its
    value is one of `neutral`: those ask for nothing.
    """

    path: str
    fate: Fate
    note: str
    neutral: tuple[Any, ...] = ()


_DONE_BY_US = "the engine of this library decides it, within device_memory and host_memory"
_ONE_PROCESS = "one process: there is nobody to communicate with"
_PIPELINE = "updates always read, compute and write at the same time"
_OFF: tuple[Any, ...] = (False, None, 0, {}, [], "none")


def _honoured(**notes: str) -> list[tuple[str, Fate, str, tuple[Any, ...]]]:
    return [(name, Fate.HONOURED, note, ()) for name, note in notes.items()]


def _without_effect(reason: str, *names: str) -> list[tuple[str, Fate, str, tuple[Any, ...]]]:
    return [(name, Fate.WITHOUT_EFFECT, reason, ()) for name in names]


def _refused(
    remedy: str, *names: str, neutral: tuple[Any, ...] = _OFF
) -> list[tuple[str, Fate, str, tuple[Any, ...]]]:
    return [(name, Fate.REFUSED, remedy, neutral) for name in names]


_OF_FP16 = (
    *("auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window"),
    *("hysteresis", "consecutive_hysteresis", "min_loss_scale"),
)
"""Keys of `fp16` that stand in `bf16` in many files. DeepSpeed 0.19 refuses them there, older releases did not."""

OF_OLDER_RELEASES = ("fp16.opt_level", *(f"bf16.{name}" for name in _OF_FP16))
"""What this library accepts and DeepSpeed 0.19 does not."""

_Rows = list[tuple[str, Fate, str, tuple[Any, ...]]]

_TOP: _Rows = [
    *_honoured(
        train_batch_size="samples a step; must be micro-batch times accumulation steps",
        train_micro_batch_size_per_gpu="batch size of the returned data loader",
        gradient_accumulation_steps="micro-steps between two updates; `backward` divides the loss by it",
        managed_gradient_accumulation="false: every `step()` updates, and updates wait for it",
        steps_per_print="steps between two log lines with lr and skipped steps",
        gradient_clipping="clips the global norm; 1.0 when absent, as in DeepSpeed 0.19; 0 turns it off and lets "
        "updates run during backward",
        wall_clock_breakdown="logs seconds and stalls by cause after every step",
        dataloader_drop_last="drops a last batch that is smaller than the others",
        log_level="level of the logger `offload`",
    ),
    *_without_effect(
        _ONE_PROCESS,
        *("disable_allgather", "communication_data_type", "seq_parallel_communication_data_type"),
        *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
        "use_data_before_expert_parallelism",
    ),
    *_without_effect("AdamW's kernel is always that of this library", "zero_allow_untested_optimizer"),
    *_without_effect("updates of streamed blocks always run on the CPU", "zero_force_ds_cpu_optimizer"),
    *_without_effect("log the configuration yourself", "dump_state"),
    *_without_effect("a steady step makes no reference cycles worth a pause", "disable_python_gc"),
    *_without_effect("`model.offload.counters()` and `offload plan` say what is where", "memory_breakdown"),
    *_without_effect("only a hint for a warning in DeepSpeed", "vocabulary_size"),
    *_refused(
        "one process: remove it, or set it to 1",
        *("sequence_parallel_size", "pipeline_parallel_size", "model_parallel_size", "tensor_parallel_size"),
        neutral=(*_OFF, 1),
    ),
    *_refused("one process: delete it", "sequence_parallel", neutral=(*_OFF, {"enabled": False})),
    *_refused(
        "nothing is computed in fp8 here, nor by DeepSpeed: delete it",
        "fp8",
        neutral=(*_OFF, {"enabled": False}),
    ),
    *_refused("DeepSpeed does not read it: write `gradient_clipping`", "max_grad_norm"),
    *_refused("DeepSpeed does not read it: the section is called `scheduler`", "lr_scheduler"),
    *_without_effect("DeepSpeed does not read it either", "comms_config.*", "monitor_config.*"),
    *_without_effect("every block recomputes from its input already", "gradient_checkpointing"),
    *_refused(
        "DeepSpeed 0.19 has removed it and refuses it as well: delete it",
        *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue"),
        *(
            "sparse_attention",
            "elasticity",
            "graph_harvesting",
            "curriculum_learning",
            "progressive_layer_drop",
        ),
        neutral=(*_OFF, {"enabled": False}),
    ),
    *_refused(
        "not for training through this library: delete it",
        *("datastates_ckpt", "weight_quantization", "expert_parallel"),
        neutral=(*_OFF, {"enabled": False}),
    ),
]

_SECTIONS: dict[str, _Rows] = {
    "optimizer": [
        *_honoured(
            type="Adam, AdamW (Adam is AdamW unless `adam_w_mode` is false), Lion, SGD or Adafactor; others are "
            "refused by name",
            params="of Adam lr, betas, eps, weight_decay, adam_w_mode, torch_adam (weight_decay is 0 when absent, as "
            "there); of the others by torch's names",
        ),
        *_without_effect("AdamW's kernel is always that of this library", "legacy_fusion"),
    ],
    "scheduler": _honoured(
        type="WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or one of torch.optim.lr_scheduler",
        params="by the names DeepSpeed's documentation has",
    ),
    "fp16": [
        *_honoured(
            enabled="fp32 parameters stay the master and are read; operations run in fp16 under torch.autocast",
            loss_scale="fixed scale; 0: dynamic",
            initial_scale_power="first dynamic scale, as a power of 2",
            loss_scale_window="steps without overflow before the scale doubles",
            hysteresis="overflows before the scale halves",
            consecutive_hysteresis="any step without overflow refills the hysteresis",
            min_loss_scale="smallest dynamic scale; an overflow there is an error",
        ),
        *_without_effect("autocast casts what an operation needs in fp16", "auto_cast"),
        *_without_effect("was of apex, which DeepSpeed has removed", "opt_level"),
        *_refused("set it to false: masters and gradients are fp32", "fp16_master_weights_and_grads"),
    ],
    "bf16": [
        *_honoured(
            enabled="parameters are computed with in bf16; the fp32 master keeps the values the model was given with",
            check_grad_overflow="a step whose gradients are not finite is skipped; updates then wait for `step()`",
        ),
        *_without_effect("gradients go straight into an fp32 plane", "immediate_grad_update"),
        *_without_effect("bf16 has the range of fp32: no loss is scaled", *_OF_FP16),
        *_refused(
            "set it to false: masters and gradients are fp32; `optimizer_state` in the section `offload` has moments "
            "in bf16 or 8 bits",
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
        ),
    ],
    "torch_autocast": [
        *_honoured(
            enabled="forward runs under torch.autocast; fp32 parameters stay fp32",
            dtype="bfloat16, or float16 with loss scaling by the keys of `fp16`",
        ),
        *_without_effect(_ONE_PROCESS, "lower_precision_safe_modules"),
    ],
    "data_types": [
        *_without_effect("gradients always accumulate in fp32", "grad_accum_dtype"),
        *_without_effect("buffers keep the dtype they are loaded in", "keep_in_fp32_modules"),
        *_refused("cast the model yourself before `initialize`", "param_dtype", "buffer_dtype"),
    ],
    "activation_checkpointing": [
        *_honoured(cpu_checkpointing="block inputs wait in host memory instead of where there is room"),
        *_without_effect(_ONE_PROCESS, "partition_activations"),
        *_without_effect(
            "every block recomputes from its input already",
            *(
                "number_checkpoints",
                "contiguous_memory_optimization",
                "synchronize_checkpoint_boundary",
                "profile",
                "enabled",
            ),
        ),
    ],
    "aio": [
        *_honoured(
            block_size="bytes of the largest single transfer, rounded up to whole pages",
            queue_depth="transfers in flight on each drive",
        ),
        *_without_effect(
            "one io_uring a drive submits batches without blocking",
            *("intra_op_parallelism", "single_submit", "overlap_events"),
        ),
        *_refused("set it to false: storage is read into host memory", "use_gds"),
    ],
    "checkpoint": [
        *_without_effect(_ONE_PROCESS, "tag_validation", "use_node_local_storage"),
        *_without_effect(
            "checkpoints are written block by block, in safetensors",
            *("parallel_write.*", "checkpoint_serialization", "writer.*"),
        ),
        *_refused("set it to false: our checkpoints do not depend on how many wrote them", "load_universal"),
    ],
    "flops_profiler": _without_effect(
        "`offload plan` counts FLOPs before the run",
        *("enabled", "recompute_fwd_factor", "profile_step"),
        *("module_depth", "top_modules", "detailed", "output_file"),
    ),
    "comms_logger": _without_effect(_ONE_PROCESS, "enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "tensorboard": _without_effect(
        "log from your loop: the loss, `get_lr()`, `get_global_grad_norm()`",
        "enabled",
        "output_path",
        "job_name",
    ),
    "csv_monitor": _without_effect("as for `tensorboard`", "enabled", "output_path", "job_name"),
    "wandb": _without_effect("as for `tensorboard`", "enabled", "group", "team", "project"),
    "comet": _without_effect(
        "as for `tensorboard`",
        *("enabled", "samples_log_interval", "project", "workspace", "api_key"),
        *("experiment_name", "experiment_key", "online", "mode"),
    ),
    "timers": _without_effect(
        "`model.offload.last_step` has them", "throughput.enabled", "throughput.synchronized"
    ),
    "autotuning": [
        *_refused("set it to false: `offload plan` chooses before the run", "enabled"),
        *_without_effect("part of `autotuning`", "*"),
    ],
    "hybrid_engine": [
        *_refused("set it to false: generate with the module under torch.no_grad()", "enabled"),
        *_without_effect("part of `hybrid_engine`", "*"),
    ],
    "data_efficiency": [
        *_refused("set it to false and sample in your data loader", "enabled"),
        *_without_effect("part of `data_efficiency`", "*"),
    ],
    "pipeline": _without_effect("only for a PipelineModule, which `initialize` refuses", "*"),
    "tensor_parallel": [
        *_refused("one process: remove it, or set it to 0", "autotp_size", neutral=(*_OFF, 1)),
        *_without_effect("part of `tensor_parallel`", "*"),
    ],
    "compile": [
        *_refused("set it to false: blocks are streamed, not compiled as one graph", "deepcompile"),
        *_without_effect("part of `deepcompile`", "*"),
    ],
    "offload": _honoured(
        **{
            "*": "ours: any setting of `offload.config.Config`, such as device_memory and host_memory, and "
            "`blocks` and `chunked_loss` of `offload.wrap`; DeepSpeed ignores the section"
        }
    ),
}

_SECTIONS["zero_optimization"] = [
    *_honoured(
        stage="0 to 3: all train alike here, since nothing is sharded; nvme needs 3, optimizer states on the cpu 1"
    ),
    *_without_effect(
        _ONE_PROCESS,
        *("reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce", "allgather_partitions"),
        *(
            "allgather_bucket_size",
            "overlap_comm",
            "round_robin_gradients",
            "stage3_use_all_reduce_for_fetch_params",
        ),
        *("stage3_allgather_sequential", "zero_hpz_partition_size", "zero_quantized_weights"),
        *("zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
    ),
    *_without_effect(
        _DONE_BY_US,
        *("sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
        *(
            "stage3_module_granularity_threshold",
            "contiguous_gradients",
            "parameter_alignment",
            "leaf_module.*",
        ),
        *("memory_efficient_linear", "override_module_apply"),
    ),
    *_without_effect("the norm comes with clipping and with overflow checks", "compute_grad_norm"),
    *_without_effect("fp32 masters are always saved and loaded", "load_from_fp32_weights"),
    *_without_effect(
        "checkpoints do not depend on how many wrote them", "elastic_checkpoint", "legacy_stage1"
    ),
    *_without_effect("checkpoints are read block by block", "pipeline_loading_checkpoint"),
    *_without_effect(
        "`save_16bit_model` always writes the whole model", "stage3_gather_16bit_weights_on_model_save"
    ),
    *_without_effect("a parameter without gradient is left alone", "ignore_unused_parameters"),
    *_without_effect("there is no trace cache", "log_trace_cache_warnings"),
    *_without_effect("checks are always on", "enable_sanity_checks"),
    *_without_effect("only for Muon, which is refused", "save_muon_momentum_buffer_in_memory"),
    *_refused("delete it: its updates are not those of AdamW; ours overlap and are exact", "zenflow.*"),
    *_refused(
        "DeepSpeed 0.19 has removed it and refuses it as well: delete it",
        *("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"),
        neutral=(*_OFF, -1),
    ),
    *_honoured(
        **{
            "offload_param.device": "nvme: parameters live on storage; cpu: in host memory; none: on the device when "
            "they fit, streamed otherwise. cpu below stage 3 means none, as in DeepSpeed",
            "offload_param.nvme_path": "directory of the store",
            "offload_param.max_in_cpu": "elements of parameters that host memory may hold beside storage",
            "offload_param.pin_memory": "false: host memory is never page-locked",
            "offload_optimizer.device": "nvme: optimizer states live on storage; cpu: in host memory; none: as "
            "offload_param has it",
            "offload_optimizer.nvme_path": "directory of the store; with another one in offload_param, state is "
            "striped over both",
            "offload_optimizer.pin_memory": "false: host memory is never page-locked",
        }
    ),
    *_without_effect(
        "staging is counted and sized by this library",
        *("offload_param.buffer_count", "offload_param.buffer_size", "offload_optimizer.buffer_count"),
    ),
    *_without_effect(_PIPELINE, "offload_optimizer.pipeline_read", "offload_optimizer.pipeline_write"),
    *_without_effect("fresh states need not be written at all", "offload_optimizer.fast_init"),
    *_without_effect("updates of streamed blocks always run on the CPU", "offload_optimizer.ratio"),
    *_without_effect(
        "updates always overlap backward or the next forward", "offload_optimizer.super_offload"
    ),
    *_without_effect(
        "`update_threads` in the section `offload` does this", "offload_optimizer.cpuadam_cores_perc"
    ),
]

KEYS: tuple[Key, ...] = tuple(
    [Key(*row) for row in _TOP]
    + [Key(f"{section}.{row[0]}", *row[1:]) for section, rows in _SECTIONS.items() for row in rows]
)
"""The table."""

OLDER_SPELLINGS: dict[str, str] = {
    "bfloat16": "bf16",
    "allgather_size": "zero_optimization.allgather_bucket_size",
    "aio.thread_count": "aio.intra_op_parallelism",
    "bf16.check_overflow": "bf16.check_grad_overflow",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer.device",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param.device",
    "zero_optimization.cpu_offload_params": "zero_optimization.offload_param.device",
    "zero_optimization.cpu_offload_use_pin_memory": "zero_optimization.offload_optimizer.pin_memory",
    **{
        f"zero_optimization.{name}": f"zero_optimization.stage3_{name}"
        for name in (
            *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
            *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
            *("module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential"),
        )
    },
}
"""Read as the newer name, with a warning."""


def find(path: str) -> Key | None:
    """The row for a dotted `path`: its own, or the nearest that ends in `.*`. None when the table has neither."""
    by_path = {key.path: key for key in KEYS}
    if path in by_path:
        return by_path[path]
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        found = by_path.get(".".join(parts[:n]) + ".*")
        if found is not None:
            return found
    return None


def is_section(path: str) -> bool:
    """Whether keys below `path` are in the table."""
    return any(key.path.startswith(path + ".") for key in KEYS)


def table() -> str:
    """The table in Markdown, older spellings below."""
    lines = ["| Key | Fate | What it does here, why not, or what to do |", "| --- | --- | --- |"]
    lines += [
        f"| `{key.path}` | {key.fate.value} | {key.note} |" for key in sorted(KEYS, key=lambda k: k.path)
    ]
    lines += ["", "| Older spelling, read with a warning | Newer |", "| --- | --- |"]
    lines += [f"| `{old}` | `{new}` |" for old, new in sorted(OLDER_SPELLINGS.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

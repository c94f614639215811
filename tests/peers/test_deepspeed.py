"""DeepSpeed itself beside this library: its swapping through our I/O engine, its losses, its keys and its schedules.

Needs DeepSpeed with its CPU operations (`pip install deepspeed ninja`; libaio's headers for its own handle). Each
training is a process of its own. `python -m pytest tests/peers` with that Python, this checkout on PYTHONPATH.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from offload.deepspeed import config, keys, schedules
from offload.errors import ConfigError

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(1800)]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

SIDE = pathlib.Path(__file__).with_name("deepspeed_side.py")
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def operations():
    """DeepSpeed's operations compile at first use, which takes minutes: not in the time that a training is given."""
    code = "from deepspeed.ops.op_builder import *; CPUAdamBuilder().load(), AsyncIOBuilder().load()"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def environment():
    """Of a child process: this checkout's modules, and the tools beside this Python."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PATH": path, "PYTHONPATH": modules}


def run(tmp_path, side, *options):
    """What `deepspeed_side.py` answers: losses and counted bytes."""
    store = tmp_path / side
    store.mkdir(exist_ok=True)
    command = [sys.executable, str(SIDE), side, "--storage", str(store), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("what", ["optimizer", "both"])
def test_deepspeed_trains_through_our_engine_with_its_own_losses(tmp_path, what):
    own = run(tmp_path, "deepspeed", "--swap", what)
    through = run(tmp_path, "deepspeed-offload-io", "--swap", what)
    assert through["losses"] == own["losses"]
    assert len(set(own["losses"])) == len(own["losses"])  # it does train
    # Each step reads and writes fp32 masters and both moments of what is swapped.
    assert through["moved"]["read_bytes"] > through["swapped_numel"] * 12
    assert through["moved"]["written_bytes"] > through["swapped_numel"] * 12


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_deepspeed_trains_151_million_parameters_through_our_engine_with_its_own_losses(tmp_path):
    """Of benchmarks/deepspeed_io.py, which has the seconds: parameters and optimizer on NVMe, three steps a side."""
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "deepspeed_io.py"),
        "--storage",
        str(tmp_path),
        "--steps",
        "3",
    ]
    command += ["--peer-python", sys.executable, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    own, ours = json.loads(out.read_text())["rows"]
    assert own["parameters"] == ours["parameters"] > 150e6
    assert own["losses"] == ours["losses"]
    assert len(set(own["losses"])) == 3
    # Every step reads and writes at least bf16 parameters, and fp32 masters with both moments.
    assert ours["moved_by_our_engine"]["read_bytes"] > 3 * 14 * ours["parameters"]
    assert ours["moved_by_our_engine"]["written_bytes"] > 3 * 14 * ours["parameters"]


def test_deepspeeds_own_adam_is_taken_as_the_torch_optimizer_with_its_groups(tmp_path):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    import offload.deepspeed
    from tests.conftest import batches, build

    losses = []
    for make in (DeepSpeedCPUAdam, torch.optim.AdamW):
        model = build("llama")
        mine = make(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
        engine, *_ = offload.deepspeed.initialize(
            model=model, optimizer=mine, config={"train_batch_size": 4, "zero_optimization": {"stage": 3}}
        )
        found = []
        for batch in batches(3):
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        losses.append(found)
        engine.destroy()
    assert losses[0] == losses[1]


def test_the_same_script_with_the_import_changed_gives_the_same_losses_within_bf16_noise(tmp_path):
    theirs = run(tmp_path, "deepspeed", "--swap", "optimizer", "--steps", "12")["losses"]
    ours = run(tmp_path, "offload", "--swap", "optimizer", "--steps", "12")["losses"]
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours == pytest.approx(theirs, abs=0.02)


def fields(model, prefix):
    """Dotted names of a pydantic model's fields, those of models inside included."""
    import typing

    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        inside = [
            each
            for each in (field.annotation, *typing.get_args(field.annotation))
            if isinstance(each, type) and issubclass(each, BaseModel)
        ]
        if inside:
            yield from fields(inside[0], f"{prefix}{name}.")
        else:
            yield prefix + (field.alias or name)


def test_every_field_of_deepspeeds_own_models_has_a_fate():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    found = [f"aio.{name}" for name in AIO_DEFAULT_DICT]
    for model, prefix in (
        (DeepSpeedZeroConfig, "zero_optimization."),
        (DeepSpeedFP16Config, "fp16."),
        (DeepSpeedBF16Config, "bf16."),
        (DeepSpeedMonitorConfig, ""),
        (CommsLoggerConfig, "comms_logger."),
        (CompileConfig, "compile."),
        (HybridEngineConfig, "hybrid_engine."),
        (TPTrainingConfig, "tensor_parallel."),
        (DeepSpeedThroughputTimerConfig, "timers.throughput."),
    ):
        found += fields(model, prefix)
    assert len(found) > 100
    assert [path for path in found if keys.find(keys.OLDER_SPELLINGS.get(path, path)) is None] == []


def test_every_field_that_deepspeed_calls_deprecated_goes_where_it_goes_there():
    """`json_schema_extra` of a deprecated field names the field that has replaced it, where one has."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found = {}
    models = {
        "zero_optimization.": DeepSpeedZeroConfig,
        "fp16.": DeepSpeedFP16Config,
        "bf16.": DeepSpeedBF16Config,
    }
    for prefix, model in models.items():
        written = {name: field.alias or name for name, field in model.model_fields.items()}
        for name, field in model.model_fields.items():
            extra = field.json_schema_extra or {}
            if extra.get("deprecated"):
                newer = extra.get("new_param", "").split(" or ")
                found[prefix + written[name]] = tuple(prefix + written.get(each, each) for each in newer)
    assert {"zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param"} <= set(found)
    for old, new in found.items():
        ours = keys.OLDER_SPELLINGS.get(old)
        assert keys.find(old) is not None if ours is None else ours.startswith(new), old


def test_every_key_that_deepspeed_reads_by_a_constant_has_a_fate():
    """Sections without a pydantic model: their readers' constants are their keys."""
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime.activation_checkpointing import config as activations

    found = set()
    for module, prefix, section in (
        (activations, "ACT_CHKPT", "activation_checkpointing"),
        (profiling, "FLOPS_PROFILER", "flops_profiler"),
    ):
        names = {
            n for n in vars(module) if n.startswith(prefix + "_") and not n.endswith(("_DEFAULT", "_FORMAT"))
        }
        found |= {f"{section}.{getattr(module, name)}" for name in names}
    assert {"activation_checkpointing.cpu_checkpointing", "flops_profiler.enabled"} <= found
    assert [path for path in sorted(found) if keys.find(path) is None] == []


def test_the_format_before_sections_is_read_as_deepspeed_reads_it():
    """`"zero_optimization": true` meant stage 1."""
    from deepspeed.runtime.zero.config import get_zero_config

    for value in (True, False):
        theirs = get_zero_config({"zero_optimization": value, "zero_allow_untested_optimizer": False}).stage
        ours = config.read({"train_batch_size": 1, "zero_optimization": value})
        assert int(theirs) == config.get(ours, "zero_optimization.stage")


@pytest.mark.parametrize(
    ("read", "words"),
    [
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "DeepSpeed's own check"),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale=-1: must be at least 0"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": -1}}},
            "DeepSpeed's own check",
        ),
        ({"bf16": {"enabled": "perhaps"}}, 'bf16.enabled="perhaps": must be true or false'),
    ],
)
def test_what_deepspeeds_own_models_refuse_is_refused(read, words):
    """By ourselves where the file alone says enough, else by them."""
    with pytest.raises(ConfigError, match=words):
        config.read({"train_batch_size": 1, **read})


def test_every_constant_that_names_a_key_at_the_top_has_a_fate():
    """Constants that DeepSpeedConfig passes to its readers; a few are names of other things."""
    import inspect
    import re

    from deepspeed.runtime import config as theirs
    from deepspeed.runtime import constants

    used = set(re.findall(r"param_dict(?:\.get\(|\[|, )\s*\(?([A-Z_]+)", inspect.getsource(theirs)))
    found = {getattr(constants, name) for name in used if isinstance(getattr(constants, name, None), str)}
    assert {"train_batch_size", "gradient_clipping", "steps_per_print"} <= found
    assert [path for path in sorted(found) if not keys.find(path) and not keys.is_section(path)] == []


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("WarmupLR", {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 7}),
        ("WarmupLR", {"warmup_num_steps": 7, "warmup_type": "linear"}),
        ("WarmupDecayLR", {"total_num_steps": 20, "warmup_num_steps": 5}),
        ("WarmupCosineLR", {"total_num_steps": 20, "warmup_num_steps": 5, "warmup_min_ratio": 0.1}),
        ("LRRangeTest", {"lr_range_test_step_size": 3, "lr_range_test_step_rate": 2.0}),
        ("LRRangeTest", {"lr_range_test_step_size": 3, "lr_range_test_staircase": True}),
        ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 6}),
        (
            "OneCycle",
            {
                "cycle_min_lr": 0.01,
                "cycle_max_lr": 0.1,
                "cycle_first_step_size": 6,
                "cycle_second_step_size": 9,
                "cycle_first_stair_count": 3,
                "decay_step_size": 2,
                "decay_lr_rate": 0.3,
                "decay_mom_rate": 0.1,
            },
        ),
    ],
)
def test_our_schedules_are_deepspeeds(name, params):
    from deepspeed.runtime import lr_schedules

    def curve(make):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
        schedule = make(optimizer)
        found = []
        for _ in range(30):
            group = optimizer.param_groups[0]
            found += [group["lr"], *group["betas"]]
            schedule.step()
        return found

    theirs = curve(lambda optimizer: getattr(lr_schedules, name)(optimizer, **params))
    ours = curve(lambda optimizer: schedules.make(name, dict(params), optimizer))
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_our_loss_scale_is_deepspeeds(monkeypatch):
    from deepspeed.runtime.fp16 import loss_scaler

    from offload.deepspeed.loss_scale import DynamicLossScale

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    overflows = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.2
    for hysteresis in (1, 2, 4):
        for consecutive in (False, True):
            theirs = loss_scaler.DynamicLossScaler(2.0**40, 5, 1.0, hysteresis, consecutive)
            ours = DynamicLossScale(
                2.0**40, window=5, hysteresis=hysteresis, consecutive_hysteresis=consecutive, scale_min=1.0
            )
            for overflow in overflows.tolist():
                if theirs.cur_scale == 1.0:
                    break
                theirs.update_scale(overflow)
                ours.update(overflow)
                assert ours.scale == theirs.cur_scale


def test_initialize_has_deepspeeds_signature():
    import inspect

    import offload.deepspeed

    theirs, ours = (
        inspect.signature(module.initialize).parameters for module in (deepspeed, offload.deepspeed)
    )
    assert list(ours) == list(theirs)
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}


@pytest.mark.parametrize(
    "name",
    [
        "backward",
        "step",
        "save_checkpoint",
        "load_checkpoint",
        "save_16bit_model",
        "gradient_accumulation_steps",
        "is_gradient_accumulation_boundary",
        "set_gradient_accumulation_boundary",
        "get_global_grad_norm",
        "get_lr",
        "get_mom",
        "get_batch_info",
        "no_sync",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "set_train_batch_size",
        "set_train_micro_batch_size",
        "zero_optimization_stage",
        "was_step_applied",
        "deepspeed_io",
        "module_state_dict",
    ],
)
def test_the_methods_that_loops_call_take_what_deepspeeds_take(name):
    import inspect

    from offload.deepspeed.engine import DeepSpeedEngine

    method = getattr(deepspeed.DeepSpeedEngine, name)
    inside = [c.cell_contents for c in method.__closure__ or () if inspect.isfunction(c.cell_contents)]
    if method.__name__ != name:  # a decorator for profiling hides what it wraps
        (method,) = (function for function in inside if function.__name__ == name)
    theirs = inspect.signature(method).parameters
    ours = inspect.signature(getattr(DeepSpeedEngine, name)).parameters
    assert [n for n in theirs if n not in ours] == []
    assert [n for n in ours if n in theirs] == [n for n in theirs if n in ours]  # the same by position


def test_our_handle_has_every_method_of_deepspeeds():
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from offload.deepspeed.aio import aio_handle

    theirs = AsyncIOBuilder().load()
    assert [n for n in dir(theirs.aio_handle) if not n.startswith("_") and not hasattr(aio_handle, n)] == []

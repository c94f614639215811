"""`"auto"` values beside what transformers itself fills in when DeepSpeed is installed."""

import copy
import os

import pytest

from offload.deepspeed import config
from tests.unit.test_deepspeed_config import AUTO, MODEL

pytestmark = [pytest.mark.peer, pytest.mark.slow]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

ARGUMENTS = [
    {},
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "max_steps": 40, "warmup_steps": 6},
    {"max_grad_norm": 0.7, "learning_rate": 2e-4, "weight_decay": 0.03, "bf16": True, "max_steps": 9},
    {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "warmup_steps": 0.1, "max_steps": 200},
    {"num_train_epochs": 2, "per_device_train_batch_size": 4},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_auto_becomes_what_transformers_fills_in(tmp_path, arguments):
    import transformers
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
    n_samples = 80
    ours = copy.deepcopy(AUTO)
    config.resolve_auto(ours, args, MODEL, n_samples=n_samples)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    n_steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * (n_samples // per_step))
    theirs = HfTrainerDeepSpeedConfig(copy.deepcopy(AUTO))
    theirs.trainer_config_process(args)
    theirs.trainer_config_finalize(args, MODEL, n_steps)
    assert ours == theirs.config
    assert "auto" not in str(ours)

"""DeepSpeed's own reader beside this library's, for files as repositories have them.

Needs DeepSpeed; nothing is compiled.
"""

import copy
import os

import pytest

from offload.deepspeed import config
from tests.unit.test_deepspeed_files import BASE, COMMENTED, MEANINGS, meaning

pytestmark = [pytest.mark.peer, pytest.mark.slow]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def of_deepspeed(given):
    """What `meaning` answers, from DeepSpeed's reader."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig(given)
    zero, fp16 = read.zero_config, read.float16_config
    scale = fp16.loss_scale or 2.0**fp16.initial_scale_power
    # parameters are left on the device below stage 3, whatever their section says
    params = zero.offload_param.device if zero.offload_param and zero.stage == 3 else "none"
    return {
        "stage": int(zero.stage),
        "states": zero.offload_optimizer.device if zero.offload_optimizer else "none",
        "params": params,
        "fp16": fp16.enabled,
        "bf16": read.bfloat16_config.enabled,
        "loss_scale": scale if fp16.enabled else 1.0,
        "batch": (
            read.train_batch_size,
            read.train_micro_batch_size_per_gpu,
            read.gradient_accumulation_steps,
        ),
        "cpu_checkpointing": read.activation_checkpointing_config.cpu_checkpointing,
    }


@pytest.mark.parametrize("name", MEANINGS)
def test_deepspeed_reads_a_file_as_this_library_does(name):
    given = {**BASE, **MEANINGS[name][0]}
    assert meaning(config.read(given)) == of_deepspeed(copy.deepcopy(given))


def test_deepspeed_reads_comments_as_this_library_does(tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    path = tmp_path / "ds.json"
    path.write_text(COMMENTED.replace('"note": "// is no comment here", ', ""))
    assert DeepSpeedConfig(str(path))._param_dict == config.load(path)

"""Settings are refused where they are given, in one sentence that says what to write."""

from __future__ import annotations

import logging
import pathlib

import pytest
import torch
from torch import nn

import offload
from offload.cli import settings as cli_settings
from offload.cli.settings import Settings
from offload.config import Config
from offload.errors import ConfigError, StoreError
from offload.model.blocks import find_blocks
from offload.tiers import storage
from tests.unit.test_store import make_store


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"storge": ["/x"]}, "there is no setting 'storge'; did you mean 'storage'?"),
        ({"nothing_like_it": 1}, "there is no setting 'nothing_like_it'"),
        ({"storage": 5}, 'a list of them, as in storage=["/mnt/nvme0"]'),
        ({"update": "backwards"}, "update='backwards': it should be 'auto', 'backward' or 'deferred'"),
        ({"micro_batches": 0}, "micro_batches=0: it should be greater than or equal to 1"),
        ({"device_memory": "8 gigs"}, "unknown unit 'gigs'; use GB"),
        ({"host_memory": "120%"}, "at most 100%"),
        ({"device_memory": True}, 'write "8GB"'),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_refused_in_a_sentence(settings, said):
    with pytest.raises(ConfigError) as refused:
        Config.checked(**settings)
    assert said in str(refused.value)
    assert "pydantic" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_storage_is_one_directory_or_several_strings_or_paths(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert Config.checked(storage=str(one)).storage == Config.checked(storage=one).storage == [str(one)]
    assert Config.checked(storage=(one, str(two))).storage == [str(one), str(two)]


def test_one_directory_is_not_taken_for_two_drives(tmp_path):
    with pytest.raises(ConfigError, match="named twice"):
        Config.checked(storage=[tmp_path, tmp_path / "." / "x" / ".."])


def three_layers():
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))


def test_blocks_may_be_the_stack_itself_and_a_name_that_is_none_is_answered_with_those_there_are():
    stack = three_layers()
    model = nn.Sequential(stack, nn.Linear(2, 1))
    assert [module for _, module in find_blocks(model, stack)] == list(stack)
    with pytest.raises(ConfigError, match="its stacks are 0 of Linear"):
        find_blocks(model, "layers")


def test_a_model_that_is_compiled_as_a_whole_is_refused_with_what_compiles_blocks():
    model = torch.compile(three_layers())
    with pytest.raises(ConfigError, match="compile_blocks=True"):
        offload.wrap(model, torch.optim.AdamW(model.parameters()))


def test_a_model_without_data_is_refused_with_what_loads_it():
    with torch.device("meta"):
        model = three_layers()
    with pytest.raises(ConfigError, match=r"offload\.load\(DIR\)"):
        offload.wrap(model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(("device", "said"), [("gpu", "'cuda:1' or 'emulated'"), ("meta", "is not known")])
def test_a_device_that_is_not_known_is_refused_with_those_that_are(device, said):
    model = three_layers()
    with pytest.raises(ConfigError, match=said):
        offload.wrap(model, torch.optim.AdamW(model.parameters()), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused():
    model = three_layers()
    with pytest.raises(ConfigError, match="this torch sees no CUDA device"):
        offload.wrap(model, torch.optim.AdamW(model.parameters()), device="cuda")


def test_a_directory_without_one_above_it_is_taken_for_a_drive_that_is_not_mounted(tmp_path):
    with pytest.raises(StoreError, match="is the drive mounted"):
        make_store(tmp_path / "mnt" / "nvme0")
    assert list(tmp_path.iterdir()) == []
    make_store(tmp_path / "new").close()


def test_a_directory_in_dram_is_warned_of(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, logger="offload"):
        make_store(tmp_path).close()
        assert "in DRAM" not in caplog.text
        monkeypatch.setattr(storage, "mount_of", lambda path: {"file_system": "tmpfs", "device": "tmpfs"})
        make_store(tmp_path).close()
    assert "in DRAM, outside of host_memory" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device_memory": "8 gigs"}, "--device-memory: .*unknown unit"),
        ({"dtype": "fp16"}, "dtype 'fp16' not understood"),
        ({"storage": ["{file}"]}, "--storage .* is a file"),
    ],
    ids=str,
)
def test_finetune_refuses_an_option_before_it_looks_at_the_model(tmp_path: pathlib.Path, settings, said):
    (tmp_path / "file").touch()
    if "storage" in settings:
        settings = {"storage": [str(tmp_path / "file")]}
    with pytest.raises(ConfigError, match=said):
        cli_settings.check(Settings(model=str(tmp_path / "no model"), data="", **settings))


class Adafactor(torch.optim.Optimizer):
    """As that of transformers: of a name that another optimizer, which is supported, has too."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda p: torch.optim.AdamW(p, amsgrad=True),
            "amsgrad=True is not supported: it needs a third moment per parameter",
        ),
        (Adafactor, f"{__name__}.Adafactor is not supported: use one of torch.optim.AdamW"),
        (
            lambda parameters: [torch.optim.AdamW(parameters)],
            "1 optimizers were given: give one, whose groups",
        ),
    ],
)
def test_an_optimizer_that_is_not_supported_is_refused_in_one_sentence(make, said):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    with pytest.raises(ConfigError) as refused:
        offload.wrap(model, make(model.parameters()))
    assert str(refused.value).startswith(said)


def test_the_cache_of_a_model_is_on_again_after_close_and_after_a_refusal(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=16
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError):
        offload.wrap(model, optimizer, device="gpu")
    assert model.config.use_cache
    model, _ = offload.wrap(model, optimizer, storage=tmp_path, step_aside="never")
    assert not model.config.use_cache
    model.offload.close()
    assert model.config.use_cache

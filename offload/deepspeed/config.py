"""Read a DeepSpeed configuration: every key meets its fate, older spellings and "auto" are resolved."""

from __future__ import annotations

import base64
import binascii
import copy
import difflib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from offload.deepspeed import keys, values
from offload.deepspeed.keys import Fate
from offload.errors import ConfigError

logger = logging.getLogger("offload")

_TRAINER_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "fp16": False,
    "bf16": False,
}
"""`transformers.TrainingArguments` without arguments; the Trainer fills "auto" from these."""

_ZERO_FILLED = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
_FILLED = ("fp16.enabled", "bf16.enabled", *(f"zero_optimization.{name}" for name in _ZERO_FILLED))
"""Where the Trainer puts a value in place of "auto", in the sections that DeepSpeed has models for."""


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as a dict of our own, from a JSON file, a base64 text of JSON, or a dict.

    Comments and commas too many are read where `hjson` is installed, with which DeepSpeed reads. Raises ConfigError for
    what is none of these, and for JSON that names a key twice.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    path = os.fspath(source)
    try:
        with open(path, encoding="utf-8-sig") as file:
            return _parse(file.read(), path)
    except OSError as error:
        try:
            text = base64.urlsafe_b64decode(path).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError):
            raise ConfigError(f"DeepSpeed configuration {path}: cannot be read: {error.strerror}") from error
        return _parse(text, "DeepSpeed configuration in base64")


def _parse(text: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{where}: key {twice[0]!r} stands there twice: delete one")
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        parsed = _parse_loosely(text, unique, f"{where}: not JSON: {error}")
    if not isinstance(parsed, dict):
        raise ConfigError(f"{where}: is {type(parsed).__name__}, a JSON object is needed")
    return parsed


def _parse_loosely(text: str, hook: Callable[..., Any], not_json: str) -> Any:
    """JSON as DeepSpeed takes it, which is Hjson: with comments, commas too many, words without quotes."""
    try:
        import hjson
    except ImportError:
        raise ConfigError(
            f"{not_json}; a file with comments, which DeepSpeed takes, needs: pip install hjson"
        ) from None
    try:
        return hjson.loads(text, object_pairs_hook=hook)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"{not_json}; nor Hjson: {error}") from None


def get(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted `path`; `default` where it or a section on the way is missing or null."""
    node: Any = config
    for name in path.split("."):
        if not isinstance(node, Mapping) or node.get(name) is None:
            return default
        node = node[name]
    return node


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted `path`, making sections on the way."""
    *sections, name = path.split(".")
    for section in sections:
        if not isinstance(config.get(section), dict):
            config[section] = {}
        config = config[section]
    config[name] = value


def _remove(config: dict[str, Any], path: str) -> Any:
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    return config.pop(name)


def modernise(config: dict[str, Any]) -> None:
    """Rename older spellings in place, each with a warning. A newer one beside it wins."""
    zero = config.get("zero_optimization")
    if isinstance(zero, bool):
        logger.warning("zero_optimization: %s is an older spelling; reading it as a stage", str(zero).lower())
        config["zero_optimization"] = {"stage": int(zero)}
    for old, new in keys.OLDER_SPELLINGS.items():
        value = get(config, old)
        if value is None:
            continue
        logger.warning("%s is an older spelling; reading it as %s", old, new)
        _remove(config, old)
        if new.endswith(".device"):
            value = "cpu" if value != "auto" and values.boolean(old, value) else "none"
        if get(config, new) is None:
            put(config, new, value)


_MODELLED = (
    *("zero_optimization.", "fp16.", "bf16.", "compile.", "hybrid_engine.", "tensor_parallel."),
    *("tensorboard.", "wandb.", "csv_monitor.", "comet.", "comms_logger.", "timers."),
)
"""Sections that DeepSpeed reads through a model, which leaves "auto" out."""


def leave_out_auto(config: dict[str, Any]) -> None:
    """Delete each "auto" that DeepSpeed deletes too, in place: in a section that it has a model for, where the Trainer
    fills nothing in. The key then has its default."""
    for path, value in list(_leaves(config)):
        is_modelled = path.startswith(_MODELLED) and not path.startswith("zero_optimization.zenflow.")
        if value == "auto" and is_modelled and path not in _FILLED:
            _remove(config, path)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything that is not a section of the table."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and keys.is_section(path) and keys.find(path) is None:
            yield from _leaves(value, path + ".")
        else:
            yield path, value


def _suggest(path: str) -> str:
    """What to do about an unknown `path`: the same name elsewhere, else the nearest key. Empty when nothing is near."""
    section, _, name = path.rpartition(".")
    if section in ("optimizer", "scheduler"):
        return f": {section} has type and params; move it into {section}.params"
    known = {key.path for key in keys.KEYS} | set(keys.OLDER_SPELLINGS)
    known |= {".".join(k.split(".")[:n]) for k in known for n in range(1, k.count(".") + 1)}
    same = sorted((k for k in known if k.rpartition(".")[2] == name), key=len)
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    near = [siblings[n] for n in difflib.get_close_matches(name, sorted(siblings), n=1, cutoff=0.6)]
    if section and same[:1] == [name]:
        return f": {name} stands beside {section.partition('.')[0]}, not in it; move it out of {section}"
    found = same or near or difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


CLIPPING = "gradient_clipping"

_told: set[str] = set()


def judge(config: Mapping[str, Any]) -> None:
    """Let every key meet its fate: unknown and refused ones raise ConfigError, those without effect are logged once."""
    for path, value in _leaves(config):
        key = keys.find(path)
        if key is None:
            if keys.is_section(path) and (value is None or value is False or value == {}):
                continue
            if keys.is_section(path):
                is_switch = any(known.path == f"{path}.enabled" for known in keys.KEYS)
                switch = f'{{"{path}": {{"enabled": true}}}}' if is_switch else "an object"
                raise ConfigError(f"{path}={json.dumps(value, default=str)}: is a section: write {switch}")
            _unknown(path)
            continue
        if key.fate is Fate.REFUSED and not _asks_for_nothing(key, value):
            raise ConfigError(f"{path}={json.dumps(value, default=str)} is refused: {key.note}")
        if key.fate is Fate.WITHOUT_EFFECT and key.path not in _told:
            _told.add(key.path)
            logger.info("%s has no effect: %s", path, key.note)


def _asks_for_nothing(key: keys.Key, value: Any) -> bool:
    """Whether a refused key has a value with which it does nothing; a section, one that is switched off."""
    if isinstance(value, Mapping) and value.get("enabled", True) in (False, "false", "auto"):
        return {"enabled": False} in key.neutral
    return value in key.neutral


def _unknown(path: str) -> None:
    """Raise ConfigError for a key that DeepSpeed refuses or that looks like another; tell of one that it passes over.

    Names that begin as comments do are comments.
    """
    if path.startswith(("_", "#", "//", "$")) or path in ("comment", "comments"):
        return
    suggestion = _suggest(path)
    if suggestion or "." in path:
        raise ConfigError(
            f"{path}: not a key of DeepSpeed's training configuration{suggestion or ': delete it'}"
        )
    if path not in _told:
        _told.add(path)
        logger.warning("%s is read by neither DeepSpeed nor this library: it has no effect", path)


def tell_defaults(config: Mapping[str, Any]) -> None:
    """Say once in the log what changes the numbers although the configuration does not name it."""
    if (
        get(config, CLIPPING) is not None
        or "max_grad_norm" in get(config, "offload", {})
        or CLIPPING in _told
    ):
        return
    _told.add(CLIPPING)
    logger.warning(
        "gradients are clipped at a norm of 1.0, the default of DeepSpeed 0.19 (older releases clip nothing), because "
        "the configuration has no %s: write the norm there, or 0 for no clipping",
        CLIPPING,
    )


def check_with_deepspeed(config: Mapping[str, Any]) -> bool:
    """Where DeepSpeed is installed, let its own models check the sections that it has models for.

    Returns whether it was there. Raises ConfigError with its message.
    """
    try:
        from deepspeed.runtime.precision_config import (
            get_bfloat16_config,
            get_float16_config,
        )
        from deepspeed.runtime.zero.config import get_zero_config
    except ImportError:
        return False
    sections = {
        "zero_optimization": get_zero_config,
        "fp16": get_float16_config,
        "bf16": get_bfloat16_config,
    }
    ours = copy.deepcopy(dict(config))
    for path in keys.OF_OLDER_RELEASES:
        if get(ours, path) is not None:
            _remove(ours, path)
    for name, read in sections.items():
        try:
            read(copy.deepcopy(ours))
        except (ValueError, AssertionError, TypeError) as error:
            raise ConfigError(f"{name}: DeepSpeed's own check says: {error}") from error
    return True


class _Trainer:
    """Values that the Hugging Face Trainer would put where "auto" stands."""

    def __init__(self, args: Any, model: Any, n_samples: int | None) -> None:
        self._args, self._model, self._n_samples = args, model, n_samples

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._args, name, None)
        return _TRAINER_DEFAULTS[name] if value is None else value

    def hidden(self) -> int:
        """0 where the model does not say."""
        config = getattr(self._model, "config", None)
        for owner in (config, getattr(config, "text_config", None)):
            sizes = getattr(owner, "hidden_size", None) or getattr(owner, "hidden_sizes", None)
            if sizes:
                return int(max(sizes)) if isinstance(sizes, (list, tuple)) else int(sizes)
        return 0

    def steps(self, path: str, batch_samples: int) -> int:
        if self.max_steps > 0:
            return int(self.max_steps)
        if self._n_samples is None:
            raise ConfigError(
                f'{path}="auto" needs the number of steps: write it, or give training_data, or args with max_steps'
            )
        per_epoch = max(1, self._n_samples // batch_samples)
        return math.ceil(self.num_train_epochs * per_epoch)

    def warmup(self, steps: int) -> int:
        ratio = getattr(self._args, "warmup_ratio", None) or 0.0
        given = self.warmup_steps
        if 0 < given < 1:
            given, ratio = 0, given
        return max(1, int(given) if given else math.ceil(steps * ratio))


def resolve_auto(
    config: dict[str, Any], args: Any = None, model: Any = None, n_samples: int | None = None
) -> None:
    """Put in place of every "auto" what the Hugging Face Trainer would, in place.

    From `args` where it has the attributes of TrainingArguments, else from their defaults. Raises ConfigError for an
    "auto" that the Trainer would not fill either.
    """
    trainer = _Trainer(args, model, n_samples)

    def fill(path: str, value: Any) -> None:
        if get(config, path) == "auto":
            put(config, path, value() if callable(value) else value)

    fill("train_micro_batch_size_per_gpu", trainer.per_device_train_batch_size)
    fill("gradient_accumulation_steps", trainer.gradient_accumulation_steps)
    micro = get(config, "train_micro_batch_size_per_gpu", trainer.per_device_train_batch_size)
    batch_samples = int(micro) * int(get(config, "gradient_accumulation_steps", 1))
    fill("train_batch_size", batch_samples)
    fill("gradient_clipping", trainer.max_grad_norm)
    fill("optimizer.params.lr", trainer.learning_rate)
    fill("optimizer.params.betas", [trainer.adam_beta1, trainer.adam_beta2])
    fill("optimizer.params.eps", trainer.adam_epsilon)
    fill("optimizer.params.weight_decay", trainer.weight_decay)
    fill("scheduler.params.warmup_min_lr", 0)
    fill("scheduler.params.warmup_max_lr", trainer.learning_rate)
    total, warmup = "scheduler.params.total_num_steps", "scheduler.params.warmup_num_steps"
    fill(total, lambda: trainer.steps(total, batch_samples))
    fill(warmup, lambda: trainer.warmup(int(get(config, total, 0) or _steps_or_none(trainer, batch_samples))))
    fill("fp16.enabled", bool(trainer.fp16))
    fill("bf16.enabled", bool(trainer.bf16))
    _fill_sizes(config, trainer.hidden())
    for path, value in _leaves(config):
        key = keys.find(path)
        is_read = key is not None and key.fate is not Fate.WITHOUT_EFFECT
        if value == "auto" and is_read and not path.startswith("offload."):
            raise ConfigError(f'{path}="auto": the Trainer does not fill this one: write a value')
    for section in ("optimizer.params", "scheduler.params"):
        for name, value in get(config, section, {}).items():
            if value == "auto":
                raise ConfigError(
                    f'{section}.{name}="auto": the Trainer does not fill this one: write a value'
                )


def _fill_sizes(config: dict[str, Any], hidden: int) -> None:
    """What the Trainer makes of the model's width; left out where the model does not say it."""
    sizes = (hidden**2, int(0.9 * hidden**2), 10 * hidden)
    for name, size in zip(_ZERO_FILLED, sizes, strict=True):
        if get(config, f"zero_optimization.{name}") != "auto":
            continue
        if hidden:
            config["zero_optimization"][name] = size
        else:
            del config["zero_optimization"][name]


def _steps_or_none(trainer: _Trainer, batch_samples: int) -> int:
    try:
        return trainer.steps("", batch_samples)
    except ConfigError:
        return 0


def batch_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(samples a step, samples a micro-batch, micro-batches a step), the missing ones derived for one process.

    Raises ConfigError when they do not agree, or when neither the first nor the second is given.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = [get(config, name) for name in names]
    for name, value in zip(names, given, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1")
    batch, micro, accumulation = given
    if batch is None and micro is None:
        raise ConfigError(f"neither {names[0]} nor {names[1]} is given: write one of them")
    if accumulation is None:
        accumulation = 1 if batch is None or micro is None else max(1, batch // micro)
    if micro is None:
        micro = max(1, int(batch or 1) // accumulation)
    if batch is None:
        batch = micro * accumulation
    if batch != micro * accumulation:
        n_processes, rest = divmod(batch, micro * accumulation)
        remedy = "correct one"
        if n_processes and not rest:
            remedy = (
                f"the file is for {n_processes} processes; for the same steps write {names[2]}="
                f"{accumulation * n_processes}"
            )
        raise ConfigError(
            f"{names[0]}={batch} is not {names[1]}={micro} times {names[2]}={accumulation} in one process: {remedy}"
        )
    return int(batch), int(micro), int(accumulation)


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    args: Any = None,
    model: Any = None,
    n_samples: int | None = None,
) -> dict[str, Any]:
    """The whole of it: load, modernise, judge, settle values, resolve "auto", and let DeepSpeed check where it is."""
    config = load(source)
    modernise(config)
    leave_out_auto(config)
    judge(config)
    values.settle(config)
    resolve_auto(config, args, model, n_samples)
    check_with_deepspeed(config)
    return config

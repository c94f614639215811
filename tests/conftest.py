"""Small random models of the shapes people train, and loops over them; nothing is downloaded."""

import contextlib
import functools
import gc
import os

import pytest
import torch

from offload import _C
from offload.profiling.workload import profile_model
from offload.runtime import planning

# For the same bits on a GPU every time. torch reads it when a process first multiplies there, in whatever test.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_finish(session):
    """A collection of garbage in a test does not go through the hundreds of thousands of objects that imports made."""
    gc.collect()
    gc.freeze()


def llama(layers=4, tie=False, dropout=0.0, hidden=64, vocab=256):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            tie_word_embeddings=tie,
            attention_dropout=dropout,
        )
    )


def gpt2(layers=4, tie=True, dropout=0.0):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=64,
            n_layer=layers,
            n_head=4,
            vocab_size=256,
            n_positions=64,
            tie_word_embeddings=tie,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    )


def qwen2(layers=4, tie=True, dropout=0.0):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
            tie_word_embeddings=tie,
            attention_dropout=dropout,
        )
    )


def bert(layers=4, tie=True, dropout=0.0):
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=64,
            tie_word_embeddings=tie,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def slow_but(fast, values):
    """Values of a test's parameter, tuples for several: those in `fast` are in the fast suite, the others are slow."""

    def slowly(value):
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in fast else slowly(value) for value in values]


class Around(torch.nn.Module):
    """A model as a part of a user's module."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **batch):
        return self.inner(**batch)


MODELS = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2, "bert": bert}


def build(kind, dtype=torch.float32, seed=0, **shape):
    torch.manual_seed(seed)
    return MODELS[kind](**shape).to(dtype).train()


def two_groups(model, lr=2e-3, kind=torch.optim.AdamW):
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return kind(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": lr / 2}],
        lr=lr,
    )


def batches(n_steps, batch=4, length=16, vocab=256, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (batch, length), generator=generator) for _ in range(n_steps)]


@functools.cache
def why_no_io_uring(path):
    """None where it can be used."""
    try:
        _C.Engine([path], backend="uring").close()
    except OSError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def _backend_is_here(request, tmp_path_factory):
    """Cases of io_uring are skipped where the build or the kernel has none."""
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("backend") == "uring":
        path = tmp_path_factory.getbasetemp() / "io_uring"
        path.write_bytes(bytes(4096))
        if reason := why_no_io_uring(str(path)):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _no_profile_of_this_machine(monkeypatch):
    """What a test plans with is what it names."""
    monkeypatch.setenv("OFFLOAD_PROFILE", "/nonexistent/hardware.json")


_TRACED = {}


def shape_of(model):
    """All that a trace without data can see of a model without settings of its own, or with those of `transformers`."""
    settings = model.config.to_dict() if hasattr(model, "config") else {}
    settings.pop("_name_or_path", None)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(parameters.items())}
    return (
        repr(model),
        repr(settings),
        tuple((name, first[id(p)], p.shape, p.dtype, p.requires_grad) for name, p in parameters.items()),
    )


@pytest.fixture
def traced_once(monkeypatch):
    """Models of one shape are traced once for all runs that are planned: a trace takes most of a small run's time. What
    it says is the promise of tests/unit/test_workload_profile.py."""

    def profile(model, tokens, *, blocks=None, inputs=None, compute_dtype=None):
        if blocks is not None or inputs is not None:
            return profile_model(model, tokens, blocks=blocks, inputs=inputs, compute_dtype=compute_dtype)
        key = (*shape_of(model), tokens, compute_dtype)
        if key not in _TRACED:
            _TRACED[key] = profile_model(model, tokens, compute_dtype=compute_dtype)
        return _TRACED[key]

    monkeypatch.setattr(planning, "profile_model", profile)


@contextlib.contextmanager
def one_thread():
    """Sums are made in one order. Fixtures of a module, which run before those of a test, need to say so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _deterministic():
    with one_thread():
        yield

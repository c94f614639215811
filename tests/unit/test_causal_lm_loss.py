"""The chunked loss equals the stock one, and the logits of the whole batch never exist."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload.errors import ConfigError, UsageError
from offload.model.causal_lm_loss import LazyLogits, chunk_loss, why_not_chunked

transformers = pytest.importorskip("transformers")

VOCAB, BATCH, SEQUENCE = 389, 3, 37


def make_model(kind: str, dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    common = {"vocab_size": VOCAB, "tie_word_embeddings": tied}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            attn_pdrop=0,
            embd_pdrop=0,
            resid_pdrop=0,
            **common,
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "phi":  # a head with a bias
        config = transformers.PhiConfig(**{**shape, "num_key_value_heads": 4}, **common)
        model = transformers.PhiForCausalLM(config)
    elif kind == "gemma2":  # softcapped logits
        config = transformers.Gemma2Config(head_dim=8, **shape, **common)
        model = transformers.Gemma2ForCausalLM(config)
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, **common))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **common))
    with torch.no_grad():  # larger logits than a fresh model's, so that the softmax is far from uniform
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.to(dtype).train()


def make_batch(ignored: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator)
    labels = ids.clone()
    if ignored:
        labels[0, 5:20] = -100
        labels[2] = -100
    return {"input_ids": ids, "labels": labels}


def run(model: nn.Module, **batch: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (got[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert error <= bound, (name, float(error))


class LargestVocabularyTensor(TorchDispatchMode):
    """Rows of the largest tensor whose last dimension is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or tensor.shape == (32, VOCAB):
                continue  # (32, VOCAB) is the transposed weight of the head
            if tensor.shape[-1] == VOCAB:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "phi"])
def test_loss_and_gradients_equal_the_stock_ones(kind: str, tied: bool) -> None:
    if kind == "phi" and tied:
        pytest.skip("Phi does not tie its head")
    model, batch = make_model(kind, tied=tied), make_batch()
    loss, gradients = run(model, **batch)
    chunk_loss(model, chunk_tokens=10)
    chunked_loss, chunked_gradients = run(model, **batch)
    assert abs(chunked_loss - loss) <= 1e-6 * loss
    assert_close(chunked_gradients, gradients, 1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bf16_gradients_are_as_near_to_fp32_as_the_stock_ones(kind: str) -> None:
    batch = make_batch()
    model = make_model(kind, torch.bfloat16, tied=True)
    loss, gradients = run(model, **batch)
    chunk_loss(model, chunk_tokens=10)
    chunked_loss, chunked_gradients = run(model, **batch)
    assert abs(chunked_loss - loss) <= 1e-6 * loss  # the forward pass is the same, bit for bit
    assert chunked_gradients.keys() == gradients.keys()
    assert_close(chunked_gradients, gradients, 2**-7)


def test_autocast_computes_the_head_in_bf16() -> None:
    model, batch = make_model("llama"), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = run(model, **batch)
    chunk_loss(model, chunk_tokens=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
        assert output.logits.dtype == torch.bfloat16
        chunked_loss, chunked_gradients = run(model, **batch)
    assert abs(chunked_loss - loss) <= 1e-6 * loss
    assert chunked_gradients["lm_head.weight"].dtype == torch.float32
    assert_close(chunked_gradients, gradients, 2**-7)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_the_whole_batch_never_exist(kind: str) -> None:
    model, batch = make_model(kind), make_batch()
    with LargestVocabularyTensor() as stock:
        run(model, **batch)
    assert stock.rows >= BATCH * SEQUENCE
    chunk_loss(model, chunk_tokens=10)
    with LargestVocabularyTensor() as chunked:
        run(model, **batch)
    assert 0 < chunked.rows <= 10


def test_a_softcapped_model_stays_exact() -> None:
    model, batch = make_model("gemma2"), make_batch()
    loss, gradients = run(model, **batch)
    chunk_loss(model, chunk_tokens=10)
    chunked_loss, chunked_gradients = run(model, **batch)
    assert torch.equal(chunked_loss, loss)
    for name, gradient in gradients.items():
        assert torch.equal(chunked_gradients[name], gradient), name


def test_num_items_in_batch_and_shift_labels_are_honoured() -> None:
    model, batch = make_model("llama"), make_batch()
    shifted = torch.full_like(batch["labels"], -100)
    shifted[:, :-1] = batch["labels"][:, 1:]
    variants = [
        {"num_items_in_batch": torch.tensor(77)},
        {"num_items_in_batch": 77},
        {"shift_labels": shifted},
        {"ignore_index": 3},
    ]
    plain = {**batch, "labels": batch["input_ids"]}
    stock = [run(model, **(plain if "ignore_index" in v else batch), **v) for v in variants]
    chunk_loss(model, chunk_tokens=10)
    for variant, (loss, gradients) in zip(variants, stock, strict=True):
        got, got_gradients = run(model, **(plain if "ignore_index" in variant else batch), **variant)
        assert abs(got - loss) <= 1e-6 * loss, variant
        assert_close(got_gradients, gradients, 1e-6)


def test_a_batch_of_ignored_tokens_has_no_gradient() -> None:
    model, batch = make_model("llama"), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    chunk_loss(model, chunk_tokens=10)
    loss, gradients = run(model, **batch)
    assert loss.isnan()
    assert all(not gradient.any() for gradient in gradients.values())


def test_loss_scaling_reaches_the_gradients() -> None:
    model, batch = make_model("llama"), make_batch()
    _, gradients = run(model, **batch)
    chunk_loss(model, chunk_tokens=10)
    model.zero_grad()
    (model(**batch).loss * 0.25).backward()
    assert_close({n: p.grad * 4 for n, p in model.named_parameters()}, gradients, 1e-6)


def test_a_frozen_head_gets_no_gradient_and_passes_one_on() -> None:
    model, batch = make_model("llama"), make_batch()
    model.lm_head.weight.requires_grad_(False)
    _, gradients = run(model, **batch)
    chunk_loss(model, chunk_tokens=10)
    _, chunked_gradients = run(model, **batch)
    assert "lm_head.weight" not in chunked_gradients
    assert_close(chunked_gradients, gradients, 1e-6)


def test_whoever_looks_at_the_logits_gets_the_real_ones() -> None:
    model, batch = make_model("llama"), make_batch()
    wanted = model(**batch).logits.detach()
    chunk_loss(model, chunk_tokens=10)
    output = model(**batch)
    assert isinstance(output.logits, LazyLogits)
    assert output.logits.shape == wanted.shape
    assert "LazyLogits" in repr(output.logits)
    assert not output.logits.is_materialised
    assert torch.equal(output.logits.argmax(-1), wanted.argmax(-1))
    assert torch.equal(output.logits.detach(), wanted)
    assert torch.equal(output.logits[0, 1] * 2, wanted[0, 1] * 2)


def test_a_loss_of_the_users_own_on_the_logits_is_differentiable() -> None:
    model, batch = make_model("llama"), make_batch()
    model(**batch).logits.square().mean().backward()
    wanted = model.lm_head.weight.grad.clone()
    model.zero_grad()
    chunk_loss(model, chunk_tokens=10)
    model(**batch).logits.square().mean().backward()
    assert torch.equal(model.lm_head.weight.grad, wanted)


def test_logits_read_after_backward_are_refused_not_wrong() -> None:
    model, batch = make_model("llama"), make_batch()
    chunk_loss(model, chunk_tokens=10)
    output = model(**batch)
    output.loss.backward()
    with pytest.raises(UsageError, match=r"before loss\.backward"):
        output.logits.argmax(-1)


def test_evaluation_and_generation_are_untouched_and_remove_restores() -> None:
    model, batch = make_model("llama"), make_batch()
    stock, _ = run(model, **batch)
    handle = chunk_loss(model, chunk_tokens=10)
    with torch.no_grad():
        assert type(model(**batch).logits) is torch.Tensor
    assert type(model(input_ids=batch["input_ids"]).logits) is torch.Tensor
    handle.remove()
    assert why_not_chunked(model) is None
    output = model(**batch)
    assert type(output.logits) is torch.Tensor
    assert torch.equal(output.loss.detach(), stock)


def test_models_it_does_not_fit_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"not torch\.nn\.Linear"):
        chunk_loss(nn.Sequential(nn.Linear(2, 2)))
    model = make_model("llama")
    chunk_loss(model)
    with pytest.raises(ConfigError, match="changed by something else"):
        chunk_loss(model)


def test_wrap_offers_it_without_a_change_to_the_model(tmp_path) -> None:
    model = make_model("llama", tied=True).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = offload.wrap(
        model, optimizer, device_memory="50MB", host_memory="50MB", storage=[str(tmp_path)], chunked_loss=True,
        step_aside="never",
    )  # fmt: skip
    ids = torch.randint(0, 50, (2, 8))
    output = model(input_ids=ids, labels=ids)
    assert isinstance(output.logits, LazyLogits)
    output.loss.backward()
    optimizer.step()
    model.offload.close()
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="chunked_loss"):
        offload.wrap(plain, torch.optim.AdamW(plain.parameters()), chunked_loss=True)

"""The workload traced without data is that of a real forward pass, of closed formulas, and of the bytes really held."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from offload.errors import ConfigError
from offload.model.blocks import cut
from offload.model.loading import StoredParameter, build_model
from offload.model.on_device import stays_nbytes
from offload.model.on_meta import model_on_meta
from offload.model.presets import ALIASES, SHAPES, Decoder, DecoderShape, shape_of
from offload.planner.workload import Workload
from offload.profiling.workload import profile_model, trace_workload, workload_of
from tests.conftest import build, slow_but

TOKENS = 24


def t5(attention="eager"):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, vocab_size=256, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration._from_config(config, attn_implementation=attention).train()


def mixtral(experts="eager", n_experts=8, chosen=2):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, num_local_experts=n_experts, num_experts_per_tok=chosen,
    )  # fmt: skip
    config._experts_implementation = experts
    return MixtralForCausalLM(config).train()


MODELS = {
    "llama": lambda: build("llama"),
    "gpt2": lambda: build("gpt2"),
    "qwen2": lambda: build("qwen2"),
    "bert": lambda: build("bert"),
    "t5": t5,
    "mixtral, loop over experts": mixtral,
    "mixtral, grouped": lambda: mixtral("grouped_mm"),
}
QUICKLY_TRACED = ["llama", "gpt2", "qwen2", "bert", "mixtral, grouped"]


@functools.cache
def profiled(kind):
    """The workload of one of MODELS; every test makes its real model anew, of the same seed."""
    return profile_model(MODELS[kind](), TOKENS)


def token_batch(model, n_samples):
    ids = torch.randint(0, 256, (n_samples, TOKENS))
    return {
        "input_ids": ids,
        "labels": ids,
        **({} if "bert" in type(model).__name__.lower() else {"use_cache": False}),
    }


def without_working_sets(work):
    blocks = tuple(replace(block, working=()) for block in work.blocks)
    return replace(work, blocks=blocks, root_working=(), root_held=(), root_early_numel=0)


@pytest.mark.parametrize("kind", slow_but(["gpt2", "mixtral, grouped"], MODELS))
def test_the_trace_without_data_is_that_of_a_real_forward(kind):
    model = MODELS[kind]()
    traced, real = profiled(kind), trace_workload(model, TOKENS)
    if "mixtral" in kind:  # what is alive depends on how many tokens each expert gets
        traced, real = without_working_sets(traced), without_working_sets(real)
    assert traced == real


@pytest.mark.parametrize("kind", slow_but(["gpt2", "mixtral, grouped"], MODELS))
def test_in_bf16_only_the_statistics_of_layer_norms_differ(kind):
    """They are fp32 without data, as on a GPU, and bf16 on the CPU."""
    model = MODELS[kind]().to(torch.bfloat16)
    meta, real = profile_model(model, TOKENS), trace_workload(model, TOKENS)
    assert meta.root_flops_per_sample == real.root_flops_per_sample
    for ours, theirs in zip(meta.blocks, real.blocks, strict=True):
        assert ours.forward_flops_per_sample == theirs.forward_flops_per_sample
        assert ours.input_nbytes_per_sample == theirs.input_nbytes_per_sample
        for a, b in zip(ours.saved, theirs.saved, strict=True):
            assert a == b or (
                a.source == "native_layer_norm" and a.nbytes_per_sample == 2 * b.nbytes_per_sample
            )


@pytest.mark.parametrize("kind", slow_but(QUICKLY_TRACED, MODELS))
def test_flops_are_those_that_torch_counts_in_a_real_forward(kind):
    """torch knows no formula for the CPU's fused attention, so it is written out, and none for grouped products."""
    model = MODELS["mixtral, loop over experts" if "grouped" in kind else kind]()
    workload = profiled(kind)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**token_batch(model, 5))
    by_module = counter.get_flop_counts()
    per_sample = workload.root_flops_per_sample + sum(b.flops_per_sample for b in workload.blocks)
    tiny = 2 * 16 * TOKENS  # rotary angles: a product that runs once for a batch of any number
    assert 0 <= counter.get_total_flops() - 5 * per_sample <= tiny
    for block in workload.blocks:
        assert sum(by_module[f"{type(model).__name__}.{block.name}"].values()) == 5 * block.flops_per_sample


def held_nbytes(model, n_samples):
    """Bytes of the distinct storages that autograd really holds, by the block that was running; -1 is the root."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    batch = token_batch(model, n_samples)
    own |= {t.untyped_storage().data_ptr() for t in batch.values() if isinstance(t, torch.Tensor)}
    running, held, alive, outside = [-1], {}, [], set()

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own and storage.data_ptr() not in outside:
            held.setdefault(storage.data_ptr(), (running[-1], storage.nbytes()))
        return tensor

    def enter(index):
        def hook(_module, args, kwargs):
            running.append(index)
            tensors = [
                t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
            ]
            alive.extend(tensors)
            outside.update(t.untyped_storage().data_ptr() for t in tensors)

        return hook

    def leave(*_):
        running.pop()

    for index, (_, block) in enumerate(cut(model).blocks):
        block.register_forward_pre_hook(enter(index), with_kwargs=True)
        block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch)
    totals = dict.fromkeys(range(-1, len(cut(model).blocks)), 0)
    for index, nbytes in held.values():
        totals[index] += nbytes
    return totals


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("n_samples", [2, 5])
def test_saved_bytes_are_those_that_a_real_forward_holds(kind, n_samples):
    model = MODELS[kind]()
    workload = profiled(kind)
    held = held_nbytes(model, n_samples)
    for index, block in enumerate(workload.blocks):
        ours = n_samples * sum(s.nbytes_per_sample for s in block.saved) + block.saved_fixed_nbytes
        assert ours == held[index], block.name


@pytest.mark.parametrize(
    ("hidden", "heads", "key_value_heads", "intermediate"), [(64, 4, 4, 160), (96, 6, 2, 128)]
)
def test_a_llama_block_follows_the_closed_formulas(hidden, heads, key_value_heads, intermediate):
    shape = DecoderShape(hidden, 3, heads, 500, intermediate, key_value_heads)
    workload = profile_model(Decoder(shape).to(torch.bfloat16), TOKENS)
    block = workload.blocks[1]
    key_value = hidden * key_value_heads // heads
    matrices = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * intermediate
    assert block.trainable_numel == matrices + 2 * hidden
    assert block.forward_flops_per_sample == {
        "linear": 2 * matrices * TOKENS,
        "attention": 4 * hidden * TOKENS**2,
    }
    assert block.input_nbytes_per_sample == 2 * hidden * TOKENS
    assert workload.root_flops_per_sample == 2 * hidden * 500 * TOKENS
    assert workload.logits_nbytes_per_sample == 2 * 500 * TOKENS
    norm = 4 * hidden + 4 + 2 * hidden + 2 * hidden
    attention = (
        2 * 2 * hidden + 2 * 2 * key_value + 4 * heads
    )  # q, k, v, output; one fp32 a head for backward
    mlp = 4 * 2 * intermediate  # gate, silu(gate), up, product
    assert sum(s.nbytes_per_sample for s in block.saved) == TOKENS * (2 * norm + attention + mlp)


def test_a_gpt_block_follows_the_closed_formulas():
    shape = DecoderShape(64, 3, 4, 500, 256, 4, positions=32, is_tied=True)
    workload = profile_model(Decoder(shape).to(torch.bfloat16), TOKENS)
    block = workload.blocks[1]
    assert block.trainable_numel == 12 * 64**2 + 13 * 64
    assert block.forward_flops_per_sample == {"linear": 24 * 64**2 * TOKENS, "attention": 4 * 64 * TOKENS**2}
    assert workload.root_trainable_numel == (500 + 32 + 2) * 64
    # two norms with fp32 mean and deviation, q k v and output, the stream between, up and its activation
    expected = 2 * (2 * 64 + 8) + 4 * 2 * 64 + 4 * 4 + 2 * 64 + 2 * 2 * 256
    assert sum(s.nbytes_per_sample for s in block.saved) == TOKENS * expected


@pytest.mark.parametrize("kind", MODELS)
def test_recomputing_what_is_saved_costs_the_forward_less_the_last_product(kind):
    """Charged once, to the first tensor that needs it; what only makes the block's output is not needed again."""
    for block in profiled(kind).blocks:
        charged = sum(s.recompute_flops_per_sample for s in block.saved)
        assert 0.5 * block.flops_per_sample <= charged <= block.flops_per_sample
    llama = profiled("llama").blocks[1]
    by_name = {s.name: s.recompute_flops_per_sample for s in llama.saved}
    assert by_name["mlp.gate_proj/linear"] == by_name["mlp.up_proj/linear"] == 2 * 64 * 128 * TOKENS
    assert by_name["self_attn/attention"] == 4 * 64 * TOKENS**2
    assert by_name["self_attn.v_proj/linear"] == 2 * 64 * 32 * TOKENS
    assert (
        llama.flops_per_sample - sum(by_name.values()) == 2 * 64 * 128 * TOKENS
    )  # down_proj makes the output


def test_recomputation_is_charged_to_the_earlier_tensor_even_when_it_is_saved_later():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            product = self.first(x)
            return self.second(torch.tanh(product)) * product

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    def inputs(n):
        return (torch.zeros(n, 5, 8, device="meta"),), {}

    block = profile_model(Model(), 5, inputs=inputs).blocks[1]
    assert [(s.name, s.recompute_flops_per_sample) for s in block.saved] == [
        ("first/linear", 2 * 64 * 5),
        ("tanh", 0),
        ("second/linear", 2 * 64 * 5),
    ]


@pytest.mark.parametrize(
    ("experts", "n_experts", "chosen"),
    [
        ("eager", 8, 2),
        ("eager", 4, 1),
        pytest.param("eager", 16, 3, marks=pytest.mark.slow),
        pytest.param("eager", 64, 3, marks=pytest.mark.slow),
        ("grouped_mm", 8, 2),
        ("grouped_mm", 4, 1),
        ("grouped_mm", 64, 3),
    ],
)
def test_experts_count_by_the_tokens_routed_to_them(experts, n_experts, chosen):
    block = profile_model(mixtral(experts, n_experts, chosen), TOKENS).blocks[1]
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    routed = 2 * 3 * 64 * 128 * chosen + 2 * 64 * n_experts
    assert block.forward_flops_per_sample == {
        "linear": TOKENS * (attention + routed),
        "attention": 4 * 64 * TOKENS**2,
    }
    assert block.trainable_numel > 3 * 64 * 128 * n_experts
    names = [s.name for s in block.saved]
    assert len(names) == len(set(names)) < 60  # the same tensor of all experts is one entry


@pytest.mark.slow
def test_a_learned_bias_of_attention_counts_as_fused_attention_on_a_device():
    written_out, fused = (profile_model(t5(kind), TOKENS).blocks[1] for kind in ("eager", "sdpa"))
    assert written_out.forward_flops_per_sample["matmul"] == fused.forward_flops_per_sample["attention"]
    assert sum(s.nbytes_per_sample for s in fused.saved) < sum(s.nbytes_per_sample for s in written_out.saved)


def test_values_narrower_than_keys_count_as_both_products_do():
    """Latent attention, whose values are narrower, and group-limited routing."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=256, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_group=2, topk_group=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    meta, real = profile_model(model, TOKENS), trace_workload(model, TOKENS)
    for ours, theirs in zip(meta.blocks, real.blocks, strict=True):
        assert ours.forward_flops_per_sample["attention"] == 2 * 4 * (24 + 16) * TOKENS**2
        assert ours.forward_flops_per_sample["linear"] == theirs.forward_flops_per_sample["linear"]
        assert ours.flops_per_sample == theirs.flops_per_sample
        assert ours.input_nbytes_per_sample == theirs.input_nbytes_per_sample


def test_dropout_keeps_one_byte_an_element_as_on_a_gpu():
    without, with_dropout = (profile_model(build("gpt2", dropout=p), TOKENS).blocks[1] for p in (0.0, 0.1))
    extra = [s for s in with_dropout.saved if s.source == "native_dropout"]
    assert [s.nbytes_per_sample for s in extra] == [64 * TOKENS] * 2  # after attention and after the MLP
    assert sum(s.nbytes_per_sample for s in with_dropout.saved) - 2 * 64 * TOKENS == sum(
        s.nbytes_per_sample for s in without.saved
    )


def test_a_model_whose_parameters_are_still_in_their_files_is_traced_and_left_there(tmp_path):
    model = build("qwen2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = build_model(str(tmp_path))
    found, expected = profile_model(stored, TOKENS), profile_model(model, TOKENS)
    # Only one of them lets two of its buffers share memory.
    assert replace(found, stays_nbytes=0) == replace(expected, stays_nbytes=0)
    assert all(isinstance(p, StoredParameter) for p in stored.parameters())


def test_the_model_is_left_as_it_was():
    model = build("llama").eval()
    before = dict(model.named_parameters())
    profile_model(model, TOKENS)
    assert all(before[name] is p and not p.is_meta for name, p in model.named_parameters())
    assert not model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_frozen_and_tied_parameters_are_told_apart():
    model = build("gpt2", tie=True)
    for p in model.transformer.h[0].parameters():
        p.requires_grad_(False)
    workload = profile_model(model, TOKENS)
    assert workload.blocks[0].trainable_numel == 0
    assert workload.blocks[0].frozen_numel == workload.blocks[1].trainable_numel
    assert workload.numel == sum(p.numel() for p in model.parameters())


# Published counts: the model cards and papers named in presets.py.
PUBLISHED = {
    "gpt3-125m": (125e6, 0.02), "gpt3-350m": (350e6, 0.02), "gpt3-760m": (760e6, 0.01), "gpt3-2.7b": (2.7e9, 0.02),
    "gpt3-6.7b": (6.7e9, 0.01), "gpt3-13b": (13.0e9, 0.02), "gpt3-30b": (30e9, 0.01), "gpt3-66b": (66e9, 0.01),
    "gpt3-175b": (175e9, 0.01), "opt-125m": (125_239_296, 0), "opt-1.3b": (1_315_758_080, 0),
    "opt-6.7b": (6_658_473_984, 0), "opt-13b": (12_853_473_280, 0), "opt-30b": (29_974_540_288, 0),
    "llama-7b": (6_738_415_616, 0), "llama-13b": (13_015_864_320, 0), "llama-33b": (32_528_943_616, 0),
    "llama-65b": (65_285_660_672, 0), "llama-70b": (68_976_648_192, 0), "llama3-8b": (8_030_261_248, 0),
    "llama3-70b": (70_553_706_496, 0), "llama-405b": (405_853_388_800, 0), "smollm2-135m": (134_515_008, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    count, tolerance = PUBLISHED[name]
    assert sum(p.numel() for p in model_on_meta(name).parameters()) == pytest.approx(
        count, rel=tolerance, abs=0
    )


def test_a_preset_is_the_model_that_transformers_builds_of_that_shape():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = replace(SHAPES["smollm2-135m"], layers=4)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, vocab_size=shape.vocab,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        theirs = profile_model(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16), 128)
        ours = profile_model(Decoder(shape).to(torch.bfloat16), 128)
    assert ours.numel == theirs.numel
    assert ours.root_flops_per_sample == theirs.root_flops_per_sample
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        assert a.forward_flops_per_sample == b.forward_flops_per_sample
        assert [s.nbytes_per_sample for s in a.saved] == [s.nbytes_per_sample for s in b.saved]
        assert [s.recompute_flops_per_sample for s in a.saved] == [
            s.recompute_flops_per_sample for s in b.saved
        ]


def test_a_preset_really_computes():
    model = Decoder(DecoderShape(32, 2, 4, 64, 48, 2))
    tokens = torch.randint(0, 64, (2, 8))
    assert model(tokens).item() == pytest.approx(math.log(64), rel=0.2)  # untrained: every token as likely
    assert profile_model(model, 8) == trace_workload(model, 8)


def test_aliases_and_unknown_names():
    assert shape_of("175b") is SHAPES["gpt3-175b"]
    assert shape_of("Llama-7B") is SHAPES["llama-7b"]
    assert set(ALIASES.values()) <= SHAPES.keys()
    with pytest.raises(ConfigError, match="gpt3-13b"):
        workload_of("gpt5-1t", 8)
    with pytest.raises(ConfigError, match="no such directory"):
        workload_of("./nowhere/config.json", 8)


@pytest.mark.slow
def test_a_preset_of_any_number_of_parameters_takes_no_memory():
    workload = workload_of("175b", 2048)
    assert workload.param_nbytes == 2
    assert len(workload.blocks) == 96
    assert workload.blocks[5].flops_per_sample == workload.blocks[95].flops_per_sample


@pytest.mark.parametrize("named", ["directory", "file"])
def test_a_directory_or_its_config_is_enough(tmp_path, named):
    model = build("qwen2", dtype=torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    workload = workload_of(str(tmp_path if named == "directory" else tmp_path / "config.json"), TOKENS)
    assert workload.blocks == profile_model(model, TOKENS).blocks
    assert workload.name == (tmp_path.name if named == "directory" else "config.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no model configuration"):
        workload_of(str(tmp_path), TOKENS)


def test_a_forward_that_needs_data_is_refused_with_a_way_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x[x.sum(-1) > 0].sum()

    def inputs(n, device="meta"):
        return (torch.ones(n, 5, 8, device=device),), {}

    with pytest.raises(ConfigError, match="trace_workload"):
        profile_model(Model(), 5, inputs=inputs)
    assert isinstance(trace_workload(Model(), 5, inputs=lambda n: inputs(n, "cpu")), Workload)
    with pytest.raises(ConfigError, match="say with `inputs`"):
        profile_model(nn.Sequential(nn.Bilinear(4, 4, 4), nn.Bilinear(4, 4, 4))[0], 5, blocks="Bilinear")


def test_an_untied_heads_gradients_come_before_the_blocks() -> None:
    """With the final norm's; a tied head's come with the embedding's, at the end."""
    for tied in (False, True):
        model = build("llama", layers=2, tie=tied)
        norm, head = model.model.norm.weight.numel(), model.lm_head.weight.numel()
        assert profile_model(model, 16).root_early_numel == norm + (0 if tied else head)


def test_buffers_are_counted_as_a_run_counts_them():
    model = build("gpt2")
    mask = torch.zeros(1, 256)
    model.transformer.h[0].register_buffer("mask", mask)
    model.transformer.h[1].register_buffer("mask", mask.expand(64, 256))  # the same memory
    model.transformer.h[2].register_buffer("statistics", torch.zeros(1000))
    counted = stays_nbytes(model)
    assert counted >= 4 * (256 + 1000)
    assert profile_model(model, TOKENS).stays_nbytes == counted
    assert trace_workload(model, TOKENS).stays_nbytes == counted


def test_a_model_that_is_only_described_has_the_buffers_of_the_real_one(tmp_path):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    assert workload_of(str(tmp_path), TOKENS).stays_nbytes == stays_nbytes(model) > 0

"""Every promised architecture family trains as in memory, wholly and with adapters, and its export loads again.

`docs/models.md` holds the table that these cases make; `python -m tests.integration.test_model_families` writes it.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from dataclasses import dataclass

import pytest
import torch

import offload
from tests.conftest import slow_but
from tests.families import FAMILIES, Family

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

DOCUMENT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- derived: families -->\n", "<!-- /derived -->"
LR = 1e-2
# The same operations in the same order: forward and gradients have the same bits. The updates differ from torch's by
# roundings (tests/unit/test_adamw_kernel.py), which 5 steps at this rate show in the last place of the loss.
LOSS_BOUND = 5e-6
MODES = ("full", "LoRA")


@dataclass
class Outcome:
    """Half a line of the table. `loss_gap` is the largest distance to plain torch, in nats."""

    has_bits_of_memory: bool
    loss_gap: float
    reloads: bool
    n_blocks: int


def prepare(family: Family, mode: str):
    """The model in fp32, or frozen in fp32 with LoRA adapters."""
    model = family.build()
    if mode == "full":
        return model
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(family.lora_targets), init_lora_weights="gaussian"
    )
    return peft.get_peft_model(model, config)


def losses_of(model, optimizer, family: Family, n_steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(n_steps):
        loss = model(**family.batch(generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)


def export_reloads(model, family: Family, directory: str) -> bool:
    """The exported directory, read by transformers, computes what the trained model does."""
    batch = family.batch(torch.Generator().manual_seed(9))
    model.eval()
    with torch.no_grad():
        expected = model(**batch)
    offload.export(model, directory, dtype=torch.float32)
    again = getattr(transformers, family.model).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        got = again(**batch)
    model.train()
    # Merged adapters are summed in another order than adapters beside their weights.
    bound = {"rtol": 1e-4, "atol": 1e-5} if hasattr(model, "peft_config") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got.loss, expected.loss, **bound)
    torch.testing.assert_close(got.logits, expected.logits, **bound)
    return True


@functools.cache
def outcome(name: str, mode: str, n_steps: int) -> Outcome:
    """Train in plain torch, unstreamed and through storage; export the last."""
    family = FAMILIES[name]
    plain = prepare(family, mode)
    expected = losses_of(plain, adamw(plain), family, n_steps)
    in_memory = {"step_aside": "never" if family.shares_activations else "always"}
    got = []
    with tempfile.TemporaryDirectory() as directory:
        through_storage = {"step_aside": "never", "storage": [directory + "/store"], "host_memory": "4MB"}
        for settings in (in_memory, through_storage):
            model = prepare(family, mode)
            model, optimizer = offload.wrap(
                model, adamw(model), device_memory="20MB", chunk_elements=4096, update_threads=1, **settings
            )
            got.append(losses_of(model, optimizer, family, n_steps))
            n_blocks = len(model.offload.blocks)
            reloads = settings is through_storage and export_reloads(model, family, directory + "/export")
            model.offload.close()
    gap = max(abs(a - b) for a, b in zip(got[1], expected, strict=True))
    return Outcome(got[0] == got[1], gap, reloads, n_blocks)


def table() -> str:
    """The table of the document; every cell is a case that passes."""
    lines = [
        "| Family | Class of transformers | Blocks streamed | Full: loss | Full: export | LoRA: loss | LoRA: export |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, family in FAMILIES.items():
        stacks = f"{family.n_blocks} ({family.stacks})"
        loss = "within the bound" if family.shares_activations else "same bits"
        lines.append(f"| {name} | `{family.model}` | {stacks} | {loss} | reloads | {loss} | reloads |")
    return "\n".join(lines) + "\n"


def check(name: str, mode: str, n_steps: int) -> None:
    result = outcome(name, mode, n_steps)
    assert result.has_bits_of_memory, "streamed training differs from the same arithmetic in memory"
    assert result.loss_gap <= LOSS_BOUND
    assert result.n_blocks == FAMILIES[name].n_blocks
    assert result.reloads


@pytest.mark.parametrize(
    "name", slow_but(["GPT-2", "BERT", "Gemma 3", "Mixtral", "Phi", "T5", "ViT"], FAMILIES)
)
def test_a_family_trains_wholly_as_in_memory_and_its_export_reloads(name):
    check(name, "full", 2)


@pytest.mark.parametrize("name", slow_but(["Llama", "T5"], ["Llama", "GPT-2", "T5", "Mixtral"]))
def test_a_family_trains_adapters_as_in_memory_and_its_merged_export_reloads(name):
    check(name, "LoRA", 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_five_steps_of_every_family_and_mode(name, mode):
    check(name, mode, 5)


def test_the_documents_table_is_that_of_these_cases():
    assert BEGIN + table() + END in DOCUMENT.read_text()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in FAMILIES:
        for mode in MODES:
            check(name, mode, 5)
            print(name, mode, outcome(name, mode, 5))
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2])

"""Classes of transformers, far more than are promised a family: small ones train through storage as in memory.

`docs/models.md` lists those that do, by `python -m tests.integration.test_every_class`, which tries all that have a
loss over tokens; each that is listed is a case here.
"""

from __future__ import annotations

import pathlib
import re
import textwrap
import time
import warnings

import pytest
import torch

import offload
from tests.tiny_models import batch, tiny

transformers = pytest.importorskip("transformers")

DOCUMENT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- derived: classes -->\n", "<!-- /derived -->"
LONGEST_S = 20
"""Classes that take longer are not listed: reference implementations of operations that want a kernel."""
LOSS_BOUND = 5e-6
"""Of losses beside plain torch, in nats; see test_model_families.py."""
AUTO = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
)


def listed() -> list[str]:
    """The classes that the document names."""
    return re.findall(r"\w+", DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0])


def losses_of(model, optimizer, n_steps=3):
    found = []
    for number in range(n_steps):
        torch.manual_seed(number)
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def gap(name: str, directory: str) -> float:
    """The largest distance of a loss to plain torch. Raises ValueError for a class that cannot be made small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = tiny(name)
        plain.config.get_text_config().use_cache = (
            False  # of which training has none; a looped model computes with it
        )
        expected = losses_of(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3))
        model = tiny(name)
        model, optimizer = offload.wrap(
            model, torch.optim.AdamW(model.parameters(), lr=1e-3), storage=[directory], device_memory="200MB",
            host_memory="4MB", chunk_elements=4096, update_threads=1, step_aside="never",
        )  # fmt: skip
        got = losses_of(model, optimizer)
        model.offload.close()
    return max(abs(a - b) for a, b in zip(got, expected, strict=True))


def test_the_document_lists_them_once_and_in_order():
    assert len(listed()) > 200
    assert listed() == sorted(set(listed()), key=str.lower)


@pytest.mark.slow
@pytest.mark.parametrize("name", listed())
def test_a_listed_class_trains_as_in_memory(tmp_path, name):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    assert gap(name, str(tmp_path)) <= LOSS_BOUND


def main() -> None:
    """Try all, say what does not, and list what does in the document."""
    import tempfile

    from transformers.models.auto import modeling_auto

    names = {
        name
        for mapping in AUTO
        for value in getattr(modeling_auto, mapping).values()
        for name in ([value] if isinstance(value, str) else value)
    }
    learned = []
    for name in sorted(names, key=str.lower):
        with tempfile.TemporaryDirectory() as directory:
            begin_s = time.perf_counter()
            try:
                found, took_s = gap(name, directory), time.perf_counter() - begin_s
                learned += [name] if found <= LOSS_BOUND and took_s <= LONGEST_S else []
                print(name, found, f"{took_s:.1f} s", "" if found <= LOSS_BOUND else "DIFFERS", flush=True)
            except ValueError as error:
                print(name, "cannot be made small:", error, flush=True)
            except Exception as error:
                print(name, "FAILS:", type(error).__name__, error, flush=True)
    text = textwrap.fill(", ".join(f"`{name}`" for name in learned), 150, break_long_words=False) + "\n"
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""The workload of a preset is that of tracing all of its layers, though only three of them are traced."""

from __future__ import annotations

import pytest

from offload.model import presets
from offload.model.on_meta import model_on_meta
from offload.model.presets import SHAPES, DecoderShape
from offload.profiling.workload import LAYERS_TRACED, profile_model, workload_of

KINDS = {
    "llama": DecoderShape(64, 0, 4, 97, 160, 4),
    "grouped": DecoderShape(64, 0, 4, 97, 160, 2, is_tied=True),
    "gpt": DecoderShape(64, 0, 4, 101, 256, 4, positions=32, is_tied=True),
    "opt": DecoderShape(64, 0, 4, 101, 256, 4, positions=32, is_tied=False, activation="relu"),
}


def shape_with(kind: str, layers: int) -> DecoderShape:
    return DecoderShape(**{**vars(KINDS[kind]), "layers": layers})


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("layers", [2, 3, 4, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_a_preset_has_the_workload_of_all_its_layers(monkeypatch, kind, layers, dtype):
    monkeypatch.setitem(SHAPES, "small", shape_with(kind, layers))
    whole = profile_model(model_on_meta("small", dtype), 24, name="small")
    assert len(whole.blocks) == layers
    assert workload_of("small", 24, dtype) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_preset_that_comes_with_it_has_the_workload_of_all_its_layers(name):
    assert workload_of(name, 256) == profile_model(model_on_meta(name), 256, name=name)


def test_a_preset_of_more_layers_runs_no_more_of_them(monkeypatch):
    made = []
    original = presets.LlamaBlock.__init__

    def counting(self, shape):
        made.append(self)
        original(self, shape)

    monkeypatch.setattr(presets.LlamaBlock, "__init__", counting)
    monkeypatch.setitem(SHAPES, "deep", shape_with("llama", 1000))
    assert len(workload_of("deep", 8).blocks) == 1000
    assert len(made) == LAYERS_TRACED

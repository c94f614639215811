"""Weights in 8 or 4 bits: what the kernels of bitsandbytes read beside them is where they are computed with."""

import pytest
import torch
from torch import nn

from offload.model.on_device import move_what_stays, stays_nbytes
from offload.model.quantized import prepare_quantized, quantized_weights

bitsandbytes = pytest.importorskip("bitsandbytes")

ELSEWHERE = torch.device("meta")


def layer_of(kind):
    """One layer, quantized on the CPU as a model that is loaded there."""
    torch.manual_seed(0)
    layer = {
        "8 bits": lambda: bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False),
        "4 bits": lambda: bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=False),
        "4 bits, scales in 8": lambda: bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4"),
    }[kind]()
    return layer.to("cpu")


KINDS = ["8 bits", "4 bits", "4 bits, scales in 8"]


def scales_of(layer):
    """All tensors that belong to the weight and are neither parameters nor buffers."""
    holders = [layer.weight, getattr(layer, "state", None), getattr(layer.weight, "quant_state", None)]
    holders.append(getattr(holders[-1], "state2", None))
    names = ("SCB", "absmax", "code", "offset")
    found = {id(t): t for h in holders for n in names if isinstance(t := getattr(h, n, None), torch.Tensor)}
    return list(found.values())


@pytest.mark.parametrize("was_used", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scales_of_a_model_loaded_on_the_cpu_go_to_the_device(kind, was_used):
    layer = layer_of(kind)
    if was_used:  # an 8-bit layer then keeps them elsewhere
        layer.train()(torch.zeros(2, 128))
    assert len(scales_of(layer)) == {"8 bits": 1, "4 bits": 2}.get(kind, 5)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    handles = prepare_quantized(model)
    assert stays_nbytes(model) == sum(t.nbytes for t in scales_of(layer))
    move_what_stays(model, ELSEWHERE)
    assert {t.device for t in scales_of(layer)} == {ELSEWHERE}
    assert len(scales_of(layer)) == {"8 bits": 1, "4 bits": 2}.get(kind, 5)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_lies_elsewhere_is_made_dense_with_copies_of_its_scales_there(kind, monkeypatch):
    """An export reads the bytes of a weight in host memory, and its scales are on the device."""
    layer, given = layer_of(kind), []
    for name in ("dequantize_4bit", "int8_vectorwise_dequant"):
        kernel = getattr(bitsandbytes.functional, name)

        def seen(weight, scales, kernel=kernel):
            state2 = getattr(scales, "state2", None)
            tensors = [scales] if isinstance(scales, torch.Tensor) else [scales.absmax, scales.code]
            given.extend([weight, *tensors, *([] if state2 is None else [state2.absmax, state2.code])])
            return kernel(weight, scales)

        monkeypatch.setattr(bitsandbytes.functional, name, seen)
    (quantized,) = quantized_weights(nn.Sequential(layer)).values()
    dense = quantized.dequantize(layer.weight.data.to(ELSEWHERE))
    assert dense.shape == (64, 128)
    assert {t.device for t in given} == {ELSEWHERE}
    assert {t.device.type for t in scales_of(layer)} == {"cpu"}

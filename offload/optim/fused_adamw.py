"""AdamW in one kernel, on chunk records in a CUDA device's memory, with the bits of csrc/optim/rules_body.h.

Triton compiles it, which comes with torch for CUDA. No multiply-add is fused (`enable_fp_fusion=False`), quotients and
roots are rounded correctly. Whoever imports this needs Triton; `updater.py` does without.
"""

import torch
import triton
import triton.language as tl

from offload.model.flat import FlatBuffer
from offload.optim.torch_rules import AdamWScalars
from offload.update_rules import LO_NBYTES

BLOCK = 1024
"""Elements of one program."""


@triton.jit(do_not_specialize=["start", "stop", "n_elements"])  # type: ignore[untyped-decorator]
def _adamw(  # type: ignore[no-untyped-def]
    param,
    lo,
    moments,
    grad,
    start,
    stop,
    n_elements,
    grad_scale,
    l2,
    decay,
    lerp_weight,
    beta2,
    one_minus_beta2,
    bias_correction2_sqrt,
    eps,
    negative_step_size,
    chunk_elements: tl.constexpr,
    record_nbytes: tl.constexpr,
    is_split: tl.constexpr,
    has_l2: tl.constexpr,
    lerp_from_grad: tl.constexpr,
    block: tl.constexpr,
):
    # `lo` and `moments` are the records themselves: planes of a chunk of n elements lie n elements apart in it.
    at = start + tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < stop
    index = at // chunk_elements
    within = at - index * chunk_elements
    in_record = tl.minimum(n_elements - index * chunk_elements, chunk_elements)
    first = index * (record_nbytes // 4) + within
    low_at = index * (record_nbytes // 2) + within
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * grad_scale
    if is_split:
        first += in_record // 2
        low = tl.load(lo + low_at, mask=inside, other=0).to(tl.int32)
        high = tl.load(param + at, mask=inside, other=0).to(tl.int32)
        p = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        p = tl.load(param + at, mask=inside, other=0.0)
    m = tl.load(moments + first, mask=inside, other=0.0)
    v = tl.load(moments + first + in_record, mask=inside, other=0.0)
    if has_l2:
        g = g + l2 * p
    p = p * decay
    m = (g if lerp_from_grad else m) + lerp_weight * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), bias_correction2_sqrt) + eps
    p = p + tl.div_rn(negative_step_size * m, denominator)
    nan = float("nan")  # one for all: see `canonical` in csrc/optim/kernels_body.h
    m = tl.where(m != m, nan, m)
    v = tl.where(v != v, nan, v)
    p = tl.where(p != p, nan, p)
    tl.store(moments + first, m, mask=inside)
    tl.store(moments + first + in_record, v, mask=inside)
    if is_split:
        bits = p.to(tl.int32, bitcast=True)
        tl.store(param + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(lo + low_at, bits.to(tl.int16), mask=inside)
    else:
        tl.store(param + at, p, mask=inside)


def update(
    buffer: FlatBuffer,
    plane: torch.Tensor,
    records: torch.Tensor,
    grads: torch.Tensor,
    start: int,
    stop: int,
    scalars: AdamWScalars,
) -> None:
    """One step of elements `start` to `stop` of a flat buffer, on the current stream of the device they are on."""
    is_split = LO_NBYTES[buffer.codec] > 0
    _adamw[(triton.cdiv(stop - start, BLOCK),)](
        plane.view(torch.int16) if is_split else plane,
        records.view(torch.int16),
        records.view(torch.float32),
        grads,
        start,
        stop,
        buffer.n_elements,
        scalars.grad_scale,
        scalars.l2,
        scalars.decay,
        scalars.lerp_weight,
        scalars.beta2,
        scalars.one_minus_beta2,
        scalars.bias_correction2_sqrt,
        scalars.eps,
        scalars.negative_step_size,
        chunk_elements=buffer.chunk_elements,
        record_nbytes=buffer.record_nbytes(buffer.chunk_elements),
        is_split=is_split,
        has_l2=scalars.l2 != 0.0,
        lerp_from_grad=scalars.lerp_from_grad,
        block=BLOCK,
        enable_fp_fusion=False,
    )

"""Products are added to the fp32 sum in place, in one kernel without rounding where torch has one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from offload.model import fp32_sums
from offload.model.fp32_sums import add_outer

CPU = torch.device("cpu")
ROWS, WORDS, WIDTH = 300, 96, 40


@contextlib.contextmanager
def addmm_with_out_dtype(kernel: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, `kernel` stands in on the CPU for what only CUDA devices have."""
    fp32_sums._adds_in_fp32.cache_clear()
    try:
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("addmm.dtype_out", kernel, "CPU")
            yield
    finally:
        fp32_sums._adds_in_fp32.cache_clear()


def as_a_gpu_does(total, left, right, out_dtype, *, beta=1, alpha=1, out):
    """What aten's CUDA kernel demands, and computes."""
    assert left.dtype == right.dtype
    assert total.dtype == out.dtype == out_dtype == torch.float32
    assert total.data_ptr() == out.data_ptr()
    assert out.is_contiguous()
    assert not torch.is_autocast_enabled("cpu")
    return out.copy_(beta * total + alpha * (left.float() @ right.float()))


def rounding_the_product(total, left, right, out_dtype, *, beta=1, alpha=1, out):
    return out.copy_(total + left @ right)


def forgetting_the_sum(total, left, right, out_dtype, *, beta=1, alpha=1, out):
    return out.copy_(left.float() @ right.float())


def refusing_an_fp32_sum(total, left, right, out_dtype, *, beta=1, alpha=1, out):
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    total = torch.randn(WORDS, WIDTH, generator=generator)
    left, right = (torch.randn(ROWS, n, generator=generator).to(dtype) for n in (WORDS, WIDTH))
    return total, left, right


def error_of_the_sum(dtype: torch.dtype) -> float:
    """Relative to the sum in float64 of the operands as they are."""
    total, left, right = operands(dtype)
    wanted = total.double() + left.double().t() @ right.double()
    place = total.data_ptr()
    add_outer(total, left, right)
    assert total.data_ptr() == place
    return float((total.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_narrow_matrices_are_added_without_rounding_where_torch_can(dtype: torch.dtype) -> None:
    with addmm_with_out_dtype(as_a_gpu_does):
        assert fp32_sums._adds_in_fp32(CPU, dtype)
        assert error_of_the_sum(dtype) < 1e-6


@pytest.mark.parametrize("kernel", [None, rounding_the_product, forgetting_the_sum, refusing_an_fp32_sum])
def test_where_torch_cannot_the_sum_is_still_right_and_the_log_says_so_once(kernel, caplog) -> None:
    replaced = contextlib.nullcontext() if kernel is None else addmm_with_out_dtype(kernel)
    fp32_sums._adds_in_fp32.cache_clear()
    with replaced, caplog.at_level(logging.INFO, "offload"):
        for _ in range(2):
            assert error_of_the_sum(torch.bfloat16) < 2**-8  # half an ulp of bf16: the product's one rounding
    fp32_sums._adds_in_fp32.cache_clear()
    assert [r.levelname for r in caplog.records if "does not add products of bfloat16" in r.message] == [
        "INFO"
    ]


def test_a_sum_in_fp32_never_asks_what_torch_can_do() -> None:
    fp32_sums._adds_in_fp32.cache_clear()
    assert error_of_the_sum(torch.float32) < 1e-6
    total, left, right = operands(torch.bfloat16)
    add_outer(total, left.float(), right)  # as on a processor
    assert fp32_sums._adds_in_fp32.cache_info().currsize == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_adds_products_to_an_fp32_sum_in_place_and_without_a_matrix_for_them(
    dtype: torch.dtype,
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    if not fp32_sums._adds_in_fp32(device, dtype):
        pytest.skip(f"torch {torch.__version__} does not add products of {dtype} to fp32 sums")
    words, width, rows = 8192, 1024, 512
    total = torch.randn(words, width, device=device)
    left, right = (torch.randn(rows, n, device=device).to(dtype) for n in (words, width))
    wanted = total.double() + left.double().t() @ right.double()
    add_outer(torch.zeros_like(total), left, right)  # libraries take their memory
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    add_outer(total, left, right)
    assert torch.cuda.max_memory_allocated() - before < words * width  # half of a product in `dtype`
    assert float((total.double() - wanted).norm() / wanted.norm()) < 1e-5

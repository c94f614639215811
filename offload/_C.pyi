from collections.abc import Callable, Sequence
from typing import Any

class Arena:
    address: int
    nbytes: int
    def __init__(self, nbytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def keep_on_fork(self, offset: int, nbytes: int) -> None: ...

class Ticket:
    def __init__(self) -> None: ...
    def complete(self, failure: str = "") -> None: ...
    def wait(self, timeout_s: float | None = None) -> None: ...
    def done(self) -> bool: ...
    def times(self) -> tuple[float, float]: ...

class Engine:
    backend: str
    backend_reason: str
    direct: bool
    def __init__(
        self,
        paths: list[str],
        *,
        backend: str = "auto",
        direct: bool = True,
        block_nbytes: int = ...,
        queue_depth: int = 32,
        stripe_nbytes: int = ...,
        inject: dict[str, Any] | None = None,
    ) -> None: ...
    def read(
        self, address: int, nbytes: int, offset: int, urgent: bool = False, *, after: Ticket | None = None
    ) -> Ticket: ...
    def write(self, address: int, nbytes: int, offset: int, *, after: Ticket | None = None) -> Ticket: ...
    def register_buffer(self, address: int, nbytes: int) -> bool: ...
    def counters(self) -> dict[str, Any]: ...
    def reopen(self, paths: list[str]) -> None: ...
    def sync(self) -> None: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...

class FileEngine:
    backend: str
    backend_reason: str
    def __init__(
        self,
        *,
        backend: str = "auto",
        block_nbytes: int = ...,
        queue_depth: int = 32,
        inject: dict[str, Any] | None = None,
    ) -> None: ...
    def read(self, file: int | str, address: int, nbytes: int, offset: int = 0) -> Ticket: ...
    def write(self, file: int | str, address: int, nbytes: int, offset: int = 0) -> Ticket: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None: ...

class Hyper:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool
    grad_scale: float
    maximize: bool
    momentum: float
    dampening: float
    nesterov: bool
    def __init__(
        self,
        lr: float,
        beta1: float = 0.0,
        beta2: float = 0.0,
        eps: float = 0.0,
        weight_decay: float = 0.0,
        step: int = 1,
        decoupled: bool = True,
        grad_scale: float = 1.0,
        maximize: bool = False,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        noise_seed: int = 0,
        noise_origin: int = 0,
    ) -> None: ...

class UpdateJob:
    def __init__(
        self,
        *,
        rule: str = "adamw",
        state_planes: Sequence[str] = ...,
        callback: Callable[[int, int, int, int, int, int, list[int]], object] | None = None,
        param_codec: str,
        n_elements: int,
        param_address: int,
        param_offset: int = -1,
        read_param: bool = False,
        state_offset: int = -1,
        state_host_address: int = 0,
        host_chunks: int = 0,
        grad_address: int = 0,
        grad_dtype: str = "float32",
        grad_offset: int = -1,
        grad_gate: Ticket | None = None,
        tag: int = -1,
        reorders: bool = False,
        held: bool = False,
        param_out_offset: int = -1,
        state_out_offset: int = -1,
        checksums_address: int = 0,
        expected_address: int = 0,
        segments: Sequence[tuple[int, int, Hyper]],
        only: Sequence[tuple[int, int]] = (),
        write_gate: Ticket | None = None,
    ) -> None: ...

class UpdatePipeline:
    def __init__(
        self,
        engine: Engine | None,
        chunk_elements: int,
        n_buffers: int,
        n_threads: int,
        buffer_address: int,
        buffer_nbytes: int,
        record_nbytes_per_element: int = 10,
    ) -> None: ...
    @staticmethod
    def buffer_nbytes_required(
        chunk_elements: int, n_buffers: int, record_nbytes_per_element: int = 10
    ) -> int: ...
    def submit(self, job: UpdateJob) -> Ticket: ...
    def turn(self) -> None: ...
    def record_spans(self, on: bool) -> None: ...
    def take_spans(self) -> list[tuple[str, int, float, float]]: ...
    def kernel_seconds(self) -> float: ...
    def stats(self) -> dict[str, float]: ...
    def close(self) -> None: ...

def crc32c(address: int, nbytes: int, crc: int = 0, level: str = "auto") -> int: ...
def crc32c_join(first: int, second: int, second_nbytes: int) -> int: ...
def crc32c_levels() -> list[str]: ...
def simd_levels() -> list[str]: ...
def split_master(source: int, hi: int, lo: int, n: int, level: str = "auto") -> None: ...
def merge_master(hi: int, lo: int, destination: int, n: int, level: str = "auto") -> None: ...
def canonicalize_nan(values: int, n: int) -> None: ...
def record_nbytes(param_codec: str, state_planes: Sequence[str], n: int) -> int: ...
def quant_map(is_signed: bool) -> list[float]: ...
def quantise(plane: str, moments: int, codes: int, absmax: int, n: int, level: str = "auto") -> None: ...
def dequantise(plane: str, codes: int, absmax: int, moments: int, n: int, level: str = "auto") -> None: ...
def rule_update(
    rule: str,
    state_planes: Sequence[str],
    param_codec: str,
    param: int,
    lo: int,
    state: Sequence[int],
    absmax: Sequence[int],
    grad: int,
    grad_dtype: str,
    n: int,
    hyper: Hyper,
    element: int = 0,
    level: str = "auto",
) -> None: ...
def adamw_update(
    param_codec: str,
    param: int,
    lo: int,
    exp_avg: int,
    exp_avg_sq: int,
    grad: int,
    grad_dtype: str,
    n: int,
    hyper: Hyper,
    level: str = "auto",
) -> None: ...

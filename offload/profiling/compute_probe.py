"""Rates of memory, bus and arithmetic: copies and products by torch, AdamW by the extension's own update pipeline."""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from torch import nn

from offload.config import Config
from offload.model.blocks import cut
from offload.model.flat import FlatBuffer
from offload.optim.updater import Updater, fused_for
from offload.tiers.device import DeviceTier, Event
from offload.tiers.host import HostArena
from offload.tiers.storage import Store
from offload.transfer.io_engine import Hyper, UpdateJob, UpdatePipeline
from offload.update_rules import ADAMW, MOMENTS, RULES, UpdateRule, kernel_rule

DEFAULT_SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))
"""(in, out) of a 7 B Llama's matrices."""

_COPY_NBYTES = _SUM_NBYTES = 256 << 20
_UPDATE_NUMEL = 1 << 24
_WIDTH_MAX = {"cuda": 16384, "cpu": 8192}
"""Wider matrices are measured at this width: they are no faster, and take memory."""
_TRIAL_ROWS = 8
"""How many rows tell whether a product of all of them can be waited for."""


def matmul_shapes(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """(in, out) of the matrices of one block of `model`, expert by expert where they are stacked."""
    block = cut(model).blocks[-1][1]
    shapes = [(int(p.shape[-1]), int(p.shape[-2])) for p in block.parameters() if p.dim() in (2, 3)]
    return tuple(dict.fromkeys(shapes)) or DEFAULT_SHAPES


def _repeat(
    work: Callable[[], object], seconds: float, settle: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each run of `work`: one to warm up, not counted, then until `seconds` are over, at least one."""
    work()
    settle()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        settle()
        times.append(time.perf_counter() - start)
    return times


def dram_bytes_per_s(seconds: float, nbytes: int = _SUM_NBYTES) -> float:
    """Bytes a second read and written by a sum of two tensors of `nbytes` in place, with all of torch's threads.

    Not by a copy: a processor may read every line that it writes, which a copy cannot count and an update does not do.
    """
    n = min(nbytes, psutil.virtual_memory().available // 8) // 4
    source, target = torch.ones(n), torch.zeros(n)
    return 3 * 4 * n / statistics.median(_repeat(lambda: target.add_(source), seconds))


def device_adam_params_per_s(device: DeviceTier, seconds: float, numel: int = _UPDATE_NUMEL) -> float:
    """Parameters a second that AdamW updates in the memory of a CUDA device, as runs do whose state stays there."""
    where = device.torch_device
    buffer = FlatBuffer(torch.bfloat16, True, (), numel, 0, 0)
    plane, grads = (torch.ones(numel, dtype=torch.bfloat16, device=where) for _ in range(2))
    records = torch.zeros(buffer.state_nbytes, dtype=torch.uint8, device=where)
    updater, segments = Updater(numel, device, fused_for(device)), [(0, numel, Hyper(lr=1e-3, step=1))]
    times = _repeat(
        lambda: updater.update(buffer, plane, records, grads, segments),
        seconds,
        lambda: torch.cuda.synchronize(where),
    )
    return numel / statistics.median(times)


def matmul_flops_per_s(
    shapes: Sequence[tuple[int, int]], n_tokens: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> float:
    """FLOP/s over the three products that training makes of each matrix: forward, and the gradients of both factors.

    Of `n_tokens` rows, or of as many as `seconds` allow on a processor that is slow in `dtype`.
    """
    settle: Callable[[], object] = (
        (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    )
    generator = torch.Generator(device).manual_seed(
        0
    )  # a run that is going on has numbers of its own to draw
    widest = _WIDTH_MAX[device.type]
    measured = [(min(n_in, widest), min(n_out, widest)) for n_in, n_out in shapes]
    share_s = seconds / len(measured)

    def run(rows: int, n_in: int, n_out: int, seconds: float) -> float:
        """FLOP/s with so many rows."""
        x, weight, grad = (
            torch.randn(*shape, device=device, dtype=dtype, generator=generator)
            for shape in ((rows, n_in), (n_out, n_in), (rows, n_out))
        )

        def products() -> None:
            x @ weight.t()
            grad @ weight
            grad.t() @ x

        return 6 * rows * n_in * n_out / statistics.median(_repeat(products, seconds, settle))

    trial = min(_TRIAL_ROWS, n_tokens)
    at_first = run(trial, *min(measured, key=math.prod), 0.0)
    n_flops, spent_s = 0.0, 0.0
    for n_in, n_out in measured:
        row_flops = 6 * n_in * n_out
        rows = max(
            trial, min(n_tokens, int(share_s * at_first / (2 * row_flops)))
        )  # one warms up, one counts
        n_flops += rows * row_flops
        spent_s += rows * row_flops / run(rows, n_in, n_out, share_s)
    return n_flops / spent_s


class UpdateLoop:
    """A fused update of split masters, with the chunks and the update threads of a training run, over and over.

    State is in DRAM; with a `store` it streams through the pipeline as in a run with everything on storage (AdamW: 10
    bytes read and 12 written a parameter), region by region over `stored_nbytes` of it.
    """

    def __init__(
        self, store: Store | None = None, stored_nbytes: int = 0, *, rule: UpdateRule = ADAMW
    ) -> None:
        self._rule = rule
        settings = Config().beside("cuda" if torch.cuda.is_available() else "cpu")
        chunk_elements, n_buffers = settings.chunk_elements, settings.chunk_buffers
        available_nbytes = psutil.virtual_memory().available // 8
        self._n_chunks = max(1, min(_UPDATE_NUMEL, available_nbytes // 16) // chunk_elements)
        record_nbytes = rule.record_nbytes("split_bf16", chunk_elements)
        region_nbytes = 2 * chunk_elements + record_nbytes
        if store is not None:
            self._n_chunks = max(1, min(self._n_chunks, stored_nbytes // region_nbytes))
        self.numel = numel = self._n_chunks * chunk_elements
        state_nbytes = self._n_chunks * record_nbytes
        buffer_nbytes = UpdatePipeline.buffer_nbytes_required(chunk_elements, n_buffers)
        self._arena = HostArena(buffer_nbytes + numel * 6 + (0 if store else state_nbytes) + 4 * 4096)
        buffers, self._params, self._grads = (
            self._arena.take(nbytes) for nbytes in (buffer_nbytes, 2 * numel, 4 * numel)
        )
        self._grads.view(torch.float32).normal_()
        self._params.zero_()
        self._state = None if store else self._arena.take(state_nbytes).zero_()
        self._regions: deque[tuple[int, int]] = deque()
        if store is not None:
            store.engine.register_buffer(self._arena.address, self._arena.nbytes)
            n_regions = max(1, stored_nbytes // (self._n_chunks * region_nbytes))
            self._regions.extend(
                (store.allocate(2 * numel), store.allocate(state_nbytes)) for _ in range(n_regions)
            )
        self._pipeline = UpdatePipeline(
            None if store is None else store.engine,
            chunk_elements,
            n_buffers,
            settings.update_threads,
            buffers.data_ptr(),
            buffer_nbytes,
        )
        for _ in range(len(self._regions)):  # what has been written once is a file's own afterwards
            self.update()

    def update(self) -> None:
        """Update all parameters once; with a store, those of the next region."""
        param_offset, state_offset = self._regions[0] if self._regions else (-1, -1)
        self._regions.rotate(-1)
        job = UpdateJob(
            rule=self._rule.name,
            state_planes=self._rule.kinds,
            param_codec="split_bf16",
            n_elements=self.numel,
            param_address=self._params.data_ptr(),
            grad_address=self._grads.data_ptr(),
            param_offset=param_offset,
            state_offset=state_offset,
            state_host_address=0 if self._state is None else self._state.data_ptr(),
            host_chunks=0 if self._state is None else self._n_chunks,
            segments=[(0, self.numel, Hyper(1e-3, 0.9, 0.999, 1e-8, 0.01, 10))],
        )
        self._pipeline.submit(job).wait()

    @property
    def kernel_seconds(self) -> float:
        """Seconds inside kernels so far, summed over the threads."""
        return self._pipeline.kernel_seconds()

    def params_per_s(self, seconds: float) -> float:
        """Parameters a second over about `seconds`."""
        return self.numel / statistics.median(_repeat(self.update, seconds))

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[], int]]:
        """Update in the background; what is given says how many parameters have been updated so far."""
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                self.update()

        thread = threading.Thread(target=work, name="offload-update-loop")
        thread.start()
        try:
            yield lambda: int(self._pipeline.stats()["chunks"]) * (self.numel // self._n_chunks)
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        """End the update threads."""
        self._pipeline.close()


def other_rules() -> list[UpdateRule]:
    """What a kernel updates beside AdamW with moments in fp32."""
    with_moments = [kernel_rule(name, moments) for name in RULES for moments in MOMENTS]
    return [rule for rule in with_moments if rule != ADAMW] + [kernel_rule("sgd", has_momentum=False)]


def update_params_per_s(seconds: float, rule: UpdateRule = ADAMW) -> float:
    """Parameters a second of a fused update in DRAM, as `UpdateLoop` makes it."""
    loop = UpdateLoop(rule=rule)
    try:
        return loop.params_per_s(seconds)
    finally:
        loop.close()


def bus_bytes_per_s(device: DeviceTier, seconds: float, copy_nbytes: int = _COPY_NBYTES) -> dict[str, float]:
    """Copies between host memory, page-locked where the device is a GPU, and `device`: each direction alone, and both
    at once. The device's own copies, as a run makes them.

    The keys are the fields of `offload.planner.hardware.Hardware`.
    """
    pin = device.torch_device.type == "cuda"
    host_up, host_down = (torch.empty(copy_nbytes, dtype=torch.uint8, pin_memory=pin) for _ in range(2))
    device_up, device_down = device.allocate(copy_nbytes), device.allocate(copy_nbytes)
    device.timing = True

    def timed(copy: Callable[[], Event], n: int) -> Callable[[], float]:
        """Issue `n` copies; the result waits for them and gives their seconds."""
        events = [copy() for _ in range(n)]

        def wait() -> float:
            events[-1].wait()
            return events[-1].times()[1] - events[0].times()[0]

        return wait

    def h2d(n: int) -> Callable[[], float]:
        return timed(lambda: device.copy_in(device_up, host_up), n)

    def d2h(n: int) -> Callable[[], float]:
        return timed(lambda: device.copy_out(host_down, device_down), n)

    device.mark().wait()
    h2d(2)(), d2h(2)()  # the first touch of the pages is not counted
    n_copies = max(4, min(200, round(seconds / 3 / h2d(1)())))
    moved_nbytes = n_copies * copy_nbytes
    alone_up, alone_down = moved_nbytes / h2d(n_copies)(), moved_nbytes / d2h(n_copies)()
    issued = h2d(n_copies), d2h(n_copies)
    up_s, down_s = issued[0](), issued[1]()
    both_s = min(up_s, down_s)  # then the slower one goes on alone

    def beside(alone: float, whole_s: float) -> float:
        """Not faster than alone, where other work made that slow."""
        return min(alone, (moved_nbytes - alone * (whole_s - both_s)) / both_s)

    return {
        "h2d_bytes_per_s": alone_up,
        "d2h_bytes_per_s": alone_down,
        "h2d_duplex_bytes_per_s": beside(alone_up, up_s),
        "d2h_duplex_bytes_per_s": beside(alone_down, down_s),
    }

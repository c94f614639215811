"""Updates of what stays in the memory of a device of its own: made there, in the order of compute, when they are due.

Parameters and chunk records are laid out as elsewhere, so that whoever reads or writes training state finds it as
usual. Gradients are read where backward has left them; nothing crosses the bus.
"""

from __future__ import annotations

from offload.optim.updater import Updater, fused_for
from offload.runtime.recording import computing
from offload.runtime.update_jobs import Segments
from offload.stores.block_store import BlockRecord
from offload.telemetry import SpanLog
from offload.tiers.device import DeviceTier


class DeviceUpdates:
    """Those of the given `on_device` blocks."""

    def __init__(self, blocks: list[BlockRecord], device: DeviceTier, spans: SpanLog) -> None:
        self._device, self._spans = device, spans
        n_elements = max(block.layout.grad_elements for block in blocks)
        self._updater = Updater(n_elements, device, fused_for(device))

    def update(self, block: BlockRecord, segments_of: list[Segments]) -> None:
        """Update with the gradients in the block's gradient buffer. Compute given later sees the new parameters."""
        held = block.grad_buffer
        if held is None:
            return
        with computing(self._device, self._spans, "update", block):
            for position, segments in enumerate(segments_of):
                buffer = block.layout.buffers[position]
                if not segments or (records := block.states[position].host) is None:
                    continue
                grads = held.plane[buffer.grad_start : buffer.grad_start + buffer.n_elements]
                self._updater.update(buffer, block.plane(buffer), records, grads, segments)

    def finish(self) -> None:
        """Wait until the updates given so far have been made."""
        self._device.mark().wait()

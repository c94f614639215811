"""In a process where Triton interprets kernels on the CPU: has the fused AdamW the bits of the extension's kernels?"""

import itertools
import sys

import torch

from offload import _C
from offload.model.flat import FlatBuffer
from offload.optim import fused_adamw, updater
from offload.optim.torch_rules import adamw_scalars
from offload.tiers.emulated_device import EmulatedDevice
from offload.update_rules import ADAMW
from tests.unit.test_adamw_kernel import start_state, with_specials
from tests.unit.test_device_rules import ALIKE, SETTINGS, by_kernel

CHUNK = 4096
N_ELEMENTS = 3 * 2048
"""A chunk and a half."""


def records_of(buffer, lo, moments):
    """Chunk records with these planes."""
    records = torch.zeros(buffer.state_nbytes, dtype=torch.uint8)
    for index, start in enumerate(range(0, buffer.n_elements, buffer.chunk_elements)):
        part = slice(start, min(start + buffer.chunk_elements, buffer.n_elements))
        planes = [lo[part]] * (buffer.codec == "split_bf16") + [m[part] for m in moments]
        content = torch.cat([plane.view(torch.uint8) for plane in planes])
        begin = buffer.record_begin(index)
        records[begin : begin + content.numel()] = content
    return records


def main():
    assert updater._same_bits(fused_adamw.update, EmulatedDevice())
    for settings, special in itertools.product(SETTINGS["adamw"], (False, True)):
        hyper = _C.Hyper(**{**ALIKE, **settings})
        for dtype, grad_dtype in itertools.product((torch.bfloat16, torch.float32), repeat=2):
            state = start_state(N_ELEMENTS, grad_dtype)
            master, *moments, grad = with_specials(state) if special else state
            buffer = FlatBuffer(dtype, True, (), N_ELEMENTS, 0, 0, ADAMW, CHUNK)
            param, lo = master, torch.zeros(N_ELEMENTS, dtype=torch.int16)
            if dtype == torch.bfloat16:
                param = torch.empty(N_ELEMENTS, dtype=dtype)
                _C.split_master(master.data_ptr(), param.data_ptr(), lo.data_ptr(), N_ELEMENTS)
            found, records = param.clone(), records_of(buffer, lo, moments)
            fused_adamw.update(buffer, found, records, grad, 0, N_ELEMENTS, adamw_scalars(hyper))
            by_kernel("adamw", planes := [param, lo, *moments], grad, hyper, buffer.codec)
            assert torch.equal(found.view(torch.uint8), planes[0].view(torch.uint8)), (settings, special)
            assert torch.equal(records, records_of(buffer, lo, moments)), (settings, special)
    print("the same bits")


if __name__ == "__main__":
    sys.exit(main())

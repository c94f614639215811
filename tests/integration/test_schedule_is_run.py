"""A real step does what its plan's schedule lists: the same operations on the same blocks, in the same order."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import offload
from offload.schedule.unroll import unroll
from offload.tiers.emulated_device import _ThreadEvent
from tests.conftest import batches, build, slow_but, two_groups

PLANS = {
    "during backward": {"update": "backward"},
    "ahead of forward": {"update": "deferred"},
    "all recomputed, all state on storage": {"saved_activations": "recompute", "host_memory": "2500KB"},
    # Roomy: pages and chunks are large beside this model, and what they leave no room for is recomputed.
    "micro-batches and clipping": {
        "micro_batches": 2,
        "max_grad_norm": 0.5,
        "device_memory": "4MB",
        "host_memory": "12MB",
    },
    "roomy": {"device_memory": "4MB", "host_memory": "9MB"},
    "state on the device": {"device_memory": "6MB", "host_memory": "8MB", "states_on_device": "3MB"},
}
FAST = ["during backward", "micro-batches and clipping", "roomy", "state on the device"]
IN_ORDER = ("forward", "recompute", "backward", "grad_out", "update by cpu", "update by compute")


def kind_and_block(name, lane):
    """What is updated on the device and what by the CPU go on beside each other."""
    kind, _, place = name.partition(" ")
    return f"update by {lane}" if kind == "update" else kind, place.partition(".")[0]


def steady(plan, workload):
    """(kind, block) of the operations of the third of four steps, in the order of the list."""
    operations, _ = unroll(plan, workload, shares_host=False, n_steps=4)
    return [kind_and_block(o.name, o.lane) for o in operations if o.step == 2]


def real_step(settings, tmp_path):
    model = build("llama", torch.float32, layers=6)
    model, optimizer = offload.wrap(
        model, two_groups(model), device="emulated", storage=[str(tmp_path)], batch=(4, 16), hardware="laptop-8gb",
        step_aside="never", chunk_elements=4096, **{"device_memory": "2MB", "host_memory": "4MB", **settings},
    )  # fmt: skip
    for batch in batches(3):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = batches(1)[0]
    with model.offload.record() as spans:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    planned = model.offload._planned
    model.offload.close()
    return [kind_and_block(span.name, span.resource) for span in spans], planned


def firsts(pairs, kind):
    """Blocks in the order in which they first do `kind`; the root is not a block."""
    return list(dict.fromkeys(block for k, block in pairs if k == kind and block != "root"))


@pytest.mark.parametrize("name", slow_but(FAST, PLANS))
def test_operations_and_their_order_are_those_of_the_schedule(tmp_path, name):
    done, planned = real_step(PLANS[name], tmp_path)
    listed = steady(planned.plan, planned.workload)
    for kind in IN_ORDER:
        if kind == "recompute" and ("recompute", "0") not in listed:
            continue  # the schedule leaves out what costs no FLOPs; the run goes through it all the same
        did, should = firsts(done, kind), firsts(listed, kind)
        if kind == "update by cpu":  # those that wait for the next forward may have begun when recording does
            late = {str(block) for block in planned.plan.deferred_blocks}
            did, should = (sorted(blocks, key=lambda block: block in late) for blocks in (did, should))
        assert did == should, kind
    for kind in ("swap_out", "swap_in"):
        assert set(firsts(done, kind)) == set(firsts(listed, kind)), kind


def test_spans_lie_within_the_record_and_lanes_do_one_thing_at_a_time_where_they_must(tmp_path):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)])
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), device="emulated", bus_bytes_per_s=1e8, step_aside="never",
        device_memory="1MB", host_memory="20MB", storage=[str(tmp_path)],
    )  # fmt: skip
    with model.offload.record() as spans:
        model(torch.randn(8, 64)).sum().backward()
        optimizer.step()
    model.offload.close()
    assert [span for span in spans if not 0 <= span.start_s <= span.end_s] == []
    for lane in ("compute", "h2d", "d2h"):
        mine = sorted((s for s in spans if s.resource == lane), key=lambda s: s.start_s)
        assert mine
        for before, after in pairwise(mine):
            assert before.end_s <= after.start_s + 1e-4


@pytest.mark.parametrize("storage", [True, False])
@pytest.mark.parametrize("until", ["forward", "backward"])
def test_a_record_that_ends_while_bytes_are_on_their_way_out_has_them_whole(
    tmp_path, monkeypatch, until, storage
):
    """Nobody waits for gradients that are parked, nor for the activations of a forward without backward."""

    def times(event, real=_ThreadEvent.times):
        if not event.done():
            raise RuntimeError("Both events must be completed before calculating elapsed time")  # as on CUDA
        return real(event)

    monkeypatch.setattr(_ThreadEvent, "times", times)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)])
    model, _ = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), device="emulated", bus_bytes_per_s=2e6, step_aside="never",
        device_memory="1MB", host_memory="20MB", storage=[str(tmp_path)] if storage else [],
        activations="storage" if storage else "host", chunk_elements=4096,
    )  # fmt: skip
    with model.offload.record() as spans:
        with model.offload.no_sync():
            loss = model(torch.randn(64, 64)).sum()
            if until == "backward":
                loss.backward()
    del loss
    model.offload.close()
    out = [span for span in spans if span.resource == "d2h"]
    assert {span.name.split()[0] for span in out} == {
        "swap_out",
        *(["grad_out"] if until == "backward" else []),
    }
    assert [span for span in spans if not 0 <= span.start_s <= span.end_s] == []

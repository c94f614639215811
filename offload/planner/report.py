"""A plan in words: what `offload plan` prints, and a run before it starts."""

from __future__ import annotations

from collections import Counter

from offload.planner.plan import INPUT, Outcome, Plan

GB = 1e9
OUTCOMES: tuple[tuple[Outcome, str], ...] = (
    ("device", "kept on the device"),
    ("host", "swapped to host memory"),
    ("storage", "swapped to storage"),
    ("recompute", "recomputed"),
)


def activation_lines(plan: Plan) -> list[str]:
    """Per tensor of a block: in how many blocks it is kept, swapped or recomputed."""
    counts: dict[str, Counter[Outcome]] = {}
    for block in plan.activations:
        for name, outcome in block.items():
            counts.setdefault(name, Counter())[outcome] += 1
    n_blocks = len(plan.activations)
    lines = []
    for name in sorted(counts, key=lambda n: n != INPUT):
        parts = []
        for outcome, words in OUTCOMES:
            count = counts[name][outcome]
            if count == n_blocks:
                parts = [words]
            elif count:
                parts.append(f"{words} in {count} blocks")
        lines.append(f"{name}: {', '.join(parts)}")
    return lines


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "es" if what.endswith("h") else "s")


def _staying_rows(plan: Plan) -> list[tuple[str, str]]:
    """What is updated on the device, if anything."""
    staying = ["the root"] * plan.on_device_root
    if plan.on_device_blocks:
        staying.append(f"the first {_count(plan.on_device_blocks, 'block')}")
    return (
        [("on the device", f"optimizer state of {' and '.join(staying)}, updated there")] if staying else []
    )


def rows(plan: Plan) -> list[tuple[str, str]]:
    """Name and value of everything worth a line."""
    n_blocks = len(plan.activations)
    update = {
        "backward": "during backward, block by block",
        "deferred": "deferred: ahead of the block's next forward",
        "mixed": f"deferred for {len(plan.deferred_blocks)} of {n_blocks} blocks, during backward for the others",
    }[plan.update]
    found = [
        ("model", plan.model),
        ("machine", plan.hardware),
        (
            "batch",
            f"{plan.batch_samples} x {plan.tokens_per_sample} tokens in {_count(plan.micro_batches, 'micro-batch')}",
        ),
        ("update", update),
        (
            "window",
            f"{_count(plan.n_slots, 'block slot')}, {_count(plan.n_grad_buffers, 'gradient buffer')} on the device",
        ),
        (
            "in host memory",
            f"parameters {plan.fraction_in_host('params'):.0%}, optimizer state {plan.fraction_in_host('states'):.0%}"
            + (f", waiting gradients {plan.fraction_in_host('grads'):.0%}" if plan.deferred_blocks else ""),
        ),
        (
            "on storage",
            ("every step is kept: all state twice" if plan.durable_steps else "what memory does not hold")
            + (", no parameters: all fit the device" if plan.params_on_device else ""),
        ),
        *_staying_rows(plan),
        ("between blocks", "on the device" if plan.boundary_on_device else "through host memory"),
    ]
    found += [("activations" if i == 0 else "", line) for i, line in enumerate(activation_lines(plan))]
    if plan.predicted is not None:
        found += _prediction_rows(plan)
    return found + [("note", note) for note in plan.notes]


def _prediction_rows(plan: Plan) -> list[tuple[str, str]]:
    p = plan.predicted
    if p is None:
        return []
    moved = p.bytes
    found = [
        (
            "step",
            f"{p.step_s:.2f} s: forward {p.forward_s:.2f}, backward {p.backward_s:.2f}, tail {p.tail_s:.2f} "
            f"(busiest resource alone {p.lower_bound_s:.2f})",
        ),
        (
            "throughput",
            f"{p.tokens_per_s:,.0f} tokens/s, {p.model_tflops:.1f} model TFLOPS, "
            f"{p.hardware_tflops:.1f} hardware TFLOPS",
        ),
        ("storage", f"read {moved['read'] / GB:.1f} GB, written {moved['written'] / GB:.1f} GB a step"),
        ("bus", f"to the device {moved['h2d'] / GB:.1f} GB, from it {moved['d2h'] / GB:.1f} GB a step"),
    ]
    for name, seconds in (("forward", p.forward_seconds), ("backward", p.backward_seconds)):
        text = ", ".join(f"{resource} {s:.2f}" for resource, s in seconds.items() if s >= 0.005)
        found.append((f"{name} alone", f"{text} s"))
    beside = ", ".join(f"{cause} {s:.2f}" for cause, s in p.exposed_seconds.items() if s >= 0.005)
    if beside:
        found.append(("not overlapped", f"{beside} s"))
    if p.peak_nbytes:
        peaks = ", ".join(f"{tier} {nbytes / GB:.2f} GB" for tier, nbytes in p.peak_nbytes.items())
        found.append(("peak", peaks))
    return found


def plan_lines(plan: Plan) -> list[str]:
    """The table."""
    return [f"{name:<15} {value}" for name, value in rows(plan)]

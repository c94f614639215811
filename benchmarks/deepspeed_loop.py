"""A training script as DeepSpeed's users have it; benchmarks/deepspeed_script.py runs it with either import.

    python benchmarks/deepspeed_loop.py --engine deepspeed|offload.deepspeed --config FILE --model 151m --steps 10

With `--through-our-io` DeepSpeed swaps through this library's I/O engine (benchmarks/deepspeed_io.py). Prints one line
of JSON: the loss of every step, the seconds of every step, and peak resident memory over what the process has after
taking a step of a tiny model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time

import torch
from llama_shaped import build
from train_side import baseline_nbytes_of, memory_nbytes, process_counters

BATCH, TOKENS, DISTINCT_BATCHES = 1, 128, 4


def batches(n_steps: int, vocab: int) -> list[torch.Tensor]:
    """The same random tokens for every side, few enough to be learnt."""
    generator = torch.Generator().manual_seed(1)
    distinct = [
        torch.randint(0, vocab, (BATCH, TOKENS), generator=generator) for _ in range(DISTINCT_BATCHES)
    ]
    return [distinct[step % DISTINCT_BATCHES] for step in range(n_steps)]


def alone(model: torch.nn.Module):
    """Plain torch: bf16 parameters, fp32 masters and moments, clipping; everything in memory."""
    masters = [p.detach().float() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.0)

    def step(tokens: torch.Tensor) -> float:
        loss = model(tokens)
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        return float(loss.detach())

    return step


def with_engine(name: str, model: torch.nn.Module, config: str):
    """The loop whose import is the only difference."""
    deepspeed = importlib.import_module(name)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(tokens: torch.Tensor) -> float:
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def main() -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["deepspeed", "offload.deepspeed", "torch"], required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--through-our-io", action="store_true")
    parser.add_argument("--model", default="151m")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is not the answer
    torch.set_num_threads(os.cpu_count() or 1)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(ranks, DS_ACCELERATOR="cpu", MASTER_PORT=str(29500 + os.getpid() % 1000))
    if options.engine != "torch":
        importlib.import_module(options.engine)
    if options.through_our_io:
        aio = importlib.import_module("offload.deepspeed.aio")
        aio.use_io_engine()
    baseline_nbytes = baseline_nbytes_of()
    model = build(options.model)
    numel = sum(p.numel() for p in model.parameters())
    vocab = model.shape.vocab
    step = alone(model) if options.engine == "torch" else with_engine(options.engine, model, options.config)
    before = process_counters()
    losses, seconds = [], []
    for tokens in batches(options.steps, vocab):
        start_s = time.perf_counter()
        losses.append(step(tokens))
        seconds.append(time.perf_counter() - start_s)
    after = process_counters()
    answer = {
        "parameters": numel,
        "losses": losses,
        "step_s": seconds,
        "rss_over_baseline_bytes": memory_nbytes("VmHWM") - baseline_nbytes,
        "read_bytes_per_step": (after["read_bytes"] - before["read_bytes"]) / options.steps,
        "written_bytes_per_step": (after["written_bytes"] - before["written_bytes"]) / options.steps,
    }
    if options.through_our_io:
        answer["moved_by_our_engine"] = aio.counters()
    print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()

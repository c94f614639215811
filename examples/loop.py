"""A training loop of your own over a model that is streamed from storage.

python examples/loop.py --storage /mnt/nvme0 [--model DIR --text FILE --device-memory 8GB --host-memory 16GB]
"""

from __future__ import annotations

import small_model
import torch
import transformers

import offload

SEQUENCE_LENGTH, BATCH_SIZE = 128, 4


def batches(path: str, tokenizer, n_steps: int):
    """Batches of pieces of the text, drawn at random."""
    with open(path, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // SEQUENCE_LENGTH * SEQUENCE_LENGTH].view(-1, SEQUENCE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        chosen = rows[torch.randint(len(rows), (BATCH_SIZE,), generator=generator)]
        yield {"input_ids": chosen, "labels": chosen}


def main(argv: list[str] | None = None) -> list[float]:
    args = small_model.parse(small_model.parser(__doc__), argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model, optimizer = offload.load(
        args.model,
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01),
        max_grad_norm=1.0,
        **small_model.budgets(args),  # storage, device_memory, host_memory
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    losses = []
    for step, batch in enumerate(batches(args.text, tokenizer, args.steps), 1):
        batch = {name: tensor.to(model.offload.device) for name, tensor in batch.items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}, gradient norm {optimizer.grad_norm:.2f}")
    counted = model.offload.counters()
    print(f"read {counted['read_bytes'] / 1e6:.1f} MB, written {counted['written_bytes'] / 1e6:.1f} MB")
    offload.export(model, args.out, tokenizer=tokenizer)
    model.offload.close()
    return losses


if __name__ == "__main__":
    main()

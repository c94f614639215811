"""A loop over Hugging Face accelerate whose model is streamed from storage: `wrap` first, then `prepare`.

python examples/accelerate_loop.py --storage /mnt/nvme0 [--model DIR --text FILE]
"""

from __future__ import annotations

import contextlib

import accelerate
import loop
import small_model
import torch
import transformers

import offload

ACCUMULATION = 2


def main(argv: list[str] | None = None) -> list[float]:
    args = small_model.parse(small_model.parser(__doc__), argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATION)
    model, optimizer = offload.load(
        args.model,
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        max_grad_norm=1.0,  # in place of accelerator.clip_grad_norm_
        **small_model.budgets(args),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    rows = [
        {name: tensor[0] for name, tensor in batch.items()}
        for batch in loop.batches(args.text, tokenizer, args.steps * 4 * ACCUMULATION)
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            # Which backwards are followed by another one is said to the engine as well.
            with contextlib.nullcontext() if accelerator.sync_gradients else model.offload.no_sync():
                loss = model(**batch).loss
                accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.print(f"{len(losses)} micro-batches: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    offload.export(accelerator.unwrap_model(model), args.out, tokenizer=tokenizer)
    model.offload.close()
    return losses


if __name__ == "__main__":
    main()

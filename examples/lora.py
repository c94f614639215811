"""LoRA adapters (by peft) on a frozen bf16 base that is streamed from storage; exported merged, and by themselves.

python examples/lora.py --storage /mnt/nvme0 [--model DIR --text FILE --device-memory 8GB --host-memory 16GB --dora]
"""

from __future__ import annotations

import os

import loop
import peft
import small_model
import torch
import transformers

import offload


def main(argv: list[str] | None = None) -> list[float]:
    arguments = small_model.parser(__doc__)
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--dora", action="store_true")
    args = small_model.parse(arguments, argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    lora = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", use_dora=args.dora, task_type="CAUSAL_LM"
    )  # fmt: skip
    model = peft.get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = offload.wrap(
        model,
        torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0),
        **small_model.budgets(args),  # storage, device_memory, host_memory
    )
    losses = []
    for step, batch in enumerate(loop.batches(args.text, tokenizer, args.steps), 1):
        loss = model(**{name: tensor.to(model.offload.device) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    n_trained = sum(parameter.numel() for parameter in trained)
    print(f"{n_trained} parameters trained; {model.offload.counters()['written_bytes'] / 1e6:.1f} MB written")
    offload.export(model, args.out, tokenizer=tokenizer)
    offload.export(model, os.path.join(args.out, "adapter"), adapter_only=True)
    model.offload.close()
    return losses


if __name__ == "__main__":
    main()

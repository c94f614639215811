"""Lightning's Trainer over a model that is streamed from storage.

python examples/lightning_loop.py --storage /mnt/nvme0 [--model DIR --text FILE --device-memory 8GB --host-memory 16GB]

Needs `pip install lightning`. See docs/lightning.md for what is said to the engine instead of to the Trainer.
"""

from __future__ import annotations

import lightning
import loop
import small_model
import torch
import transformers

import offload


class Learning(lightning.LightningModule):
    """A language model; optimizer and budgets are given to the engine when the module is made."""

    def __init__(self, directory: str, budgets: dict[str, object]) -> None:
        super().__init__()
        self.model, self.made = offload.load(
            directory, lambda parameters: torch.optim.AdamW(parameters, lr=3e-3), max_grad_norm=1.0, **budgets
        )
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        schedule = torch.optim.lr_scheduler.LinearLR(self.made, 1.0, 0.1, total_iters=100)
        return {"optimizer": self.made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv: list[str] | None = None) -> list[float]:
    args = small_model.parse(small_model.parser(__doc__), argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    module = Learning(args.model, small_model.budgets(args))
    trainer = lightning.Trainer(
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,  # offload.save and offload.export write what there is to write
        default_root_dir=args.out,
    )
    batches = list(loop.batches(args.text, tokenizer, args.steps))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    offload.export(module.model, args.out, tokenizer=tokenizer)
    module.model.offload.close()
    return module.losses


if __name__ == "__main__":
    main()

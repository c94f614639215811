"""TRL's SFTTrainer over a model that is streamed from storage: the mixin comes before it.

python examples/trl_sft.py --storage /mnt/nvme0 [--model DIR --text FILE --device-memory 8GB --host-memory 16GB]

Needs `pip install trl`. The same class statement makes streamed trainers of DPOTrainer, KTOTrainer, RewardTrainer and
GRPOTrainer; see docs/huggingface.md.
"""

from __future__ import annotations

import datasets
import small_model
import transformers
import trl

from offload.transformers import OffloadMixin, load_model


class StreamedSFTTrainer(OffloadMixin, trl.SFTTrainer):
    """SFTTrainer, with the training state in the tiers."""


def paragraphs(path: str) -> datasets.Dataset:
    """One row a paragraph."""
    with open(path, encoding="utf-8") as file:
        return datasets.Dataset.from_list(
            [{"text": text} for text in file.read().split("\n\n") if text.strip()]
        )


def main(argv: list[str] | None = None) -> list[float]:
    args = small_model.parse(small_model.parser(__doc__), argv)
    trainer = StreamedSFTTrainer(
        model=load_model(args.model),  # its parameters stay in their files until they are streamed
        args=trl.SFTConfig(
            output_dir=args.out,
            max_steps=args.steps,
            max_length=128,
            packing=True,
            packing_strategy="wrapped",
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            bf16=False,  # the model's own dtype, and no autocast over it
            logging_steps=5,
            save_steps=args.steps,
            report_to=[],
        ),
        train_dataset=paragraphs(args.text),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
        offload=small_model.budgets(args),  # storage, device_memory, host_memory
    )
    trainer.train()
    trainer.save_model()
    trainer.close()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()

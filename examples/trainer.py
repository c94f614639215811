"""Hugging Face's Trainer over a model that is streamed from storage: one class is another one.

python examples/trainer.py --storage /mnt/nvme0 [--model DIR --text FILE --device-memory 8GB --host-memory 16GB]
"""

from __future__ import annotations

import small_model
import transformers

from offload.transformers import OffloadTrainer, load_model

SEQUENCE_LENGTH = 128


def rows_of(path: str, tokenizer) -> list[dict[str, list[int]]]:
    """The text's tokens in pieces of equal length."""
    with open(path, encoding="utf-8") as file:
        ids = tokenizer(file.read()).input_ids
    pieces = [ids[i : i + SEQUENCE_LENGTH] for i in range(0, len(ids) - SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(argv: list[str] | None = None) -> list[float]:
    args = small_model.parse(small_model.parser(__doc__), argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows = rows_of(args.text, tokenizer)
    trainer = OffloadTrainer(
        model=load_model(args.model),  # its parameters stay in their files until they are streamed
        args=transformers.TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=args.steps // 2,
            save_steps=args.steps // 2,
            save_total_limit=1,
            report_to=[],
        ),
        train_dataset=rows[4:],
        eval_dataset=rows[:4],
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
        offload=small_model.budgets(args),  # storage, device_memory, host_memory
    )
    trainer.train()
    trainer.save_model()
    trainer.close()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()

"""Instruction data in chat format: answers alone are learned, and several conversations share a row, unseen.

python examples/chat.py --storage /mnt/nvme0 [--model DIR --data FILE.jsonl]

Each line of the file is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}.
"""

from __future__ import annotations

import json

import small_model
import transformers

from offload.transformers import OffloadTrainer, load_model, pack_chats

SEQUENCE_LENGTH = 256


def sums(n: int = 1000) -> list[list[dict[str, str]]]:
    """Conversations that stand in for a file."""
    pairs = [(i * 7 % 10, i * 3 % 10) for i in range(n)]
    return [
        [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
        ]
        for a, b in pairs
    ]


def main(argv: list[str] | None = None) -> str:
    arguments = small_model.parser(__doc__)
    arguments.add_argument("--data", help="JSON lines with messages; default: sums")
    args = small_model.parse(arguments, argv)
    conversations = sums()
    if args.data:
        with open(args.data, encoding="utf-8") as file:
            conversations = [json.loads(line)["messages"] for line in file if line.strip()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows = pack_chats(conversations, tokenizer, SEQUENCE_LENGTH)
    print(f"{len(conversations)} conversations in {len(rows)} rows of {SEQUENCE_LENGTH} tokens")
    trainer = OffloadTrainer(
        model=load_model(args.model),
        args=transformers.TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows,
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
        offload=small_model.budgets(args),  # storage, device_memory, host_memory
    )
    trainer.train()
    question = [conversations[0][0]]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = trainer.model.eval().generate(**asked, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    print(question[0]["content"], "->", text)
    trainer.save_model()
    trainer.close()
    return text


if __name__ == "__main__":
    main()

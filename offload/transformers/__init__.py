"""Hugging Face's Trainer over streamed training state. Needs the packages `transformers` and `accelerate`."""

from offload.model.loading import build_model as load_model
from offload.transformers.chat import pack_chats
from offload.transformers.trainer import OffloadMixin, OffloadSeq2SeqTrainer, OffloadTrainer

__all__ = ["OffloadMixin", "OffloadSeq2SeqTrainer", "OffloadTrainer", "load_model", "pack_chats"]

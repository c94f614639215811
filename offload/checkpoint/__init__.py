"""Models into the store and out of it, and training state to disk and back: load, export, save, resume, inspect,
change."""

from offload.checkpoint.change import change
from offload.checkpoint.deepspeed import from_deepspeed
from offload.checkpoint.export import export
from offload.checkpoint.inspect import inspect
from offload.checkpoint.load import load
from offload.checkpoint.resume import Resumed, resume
from offload.checkpoint.save import save

__all__ = ["Resumed", "change", "export", "from_deepspeed", "inspect", "load", "resume", "save"]

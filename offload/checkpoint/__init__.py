"""Models into the store and out of it: loading and exporting Hugging Face directories block by block."""

from offload.checkpoint.export import export
from offload.checkpoint.load import load

__all__ = ["export", "load"]

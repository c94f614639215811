"""Typed face of the engine's requests and of the update pipeline in `offload._C`, for the rooms above the tiers."""

from offload._C import Hyper, Ticket, UpdateJob, UpdatePipeline, split_master

__all__ = ["Hyper", "Ticket", "UpdateJob", "UpdatePipeline", "split_master"]

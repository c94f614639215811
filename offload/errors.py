"""The error tree. Every message says what happened, to which thing, and what to do."""

from __future__ import annotations


class OffloadError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(OffloadError, ValueError):
    """A setting cannot be understood or contradicts another one."""


class BudgetError(OffloadError):
    """The configuration cannot fit the memory or storage allowed; nothing has been written."""


class StoreError(OffloadError):
    """A store file cannot be created, locked, read or written."""


class CheckpointError(StoreError):
    """A checkpoint or a kept store cannot be read: malformed, of a newer version, of another model, or in use."""


class CorruptError(CheckpointError):
    """Stored bytes are not the bytes that were written: a wrong checksum, or a file that has been cut short."""


class UsageError(OffloadError):
    """The training loop did something whose result would not be exact, such as two backwards in one step."""

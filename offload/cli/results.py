"""Whether the files that a command is to write can be written: asked before its work, not after it."""

from __future__ import annotations

import os

from offload.errors import ConfigError


def check_file(option: str, path: str | None) -> None:
    """Raise ConfigError where `path`, given as `option`, cannot be a file that is written; nothing is created."""
    if path is None:
        return
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise ConfigError(f"{option} {path} is a directory: name a file")
    if not os.path.isdir(directory):
        raise ConfigError(f"{option} {path}: there is no directory {directory}; make it first")
    if not can_be_made(directory) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        raise ConfigError(f"{option} {path} cannot be written by this user: choose another file")


def can_be_made(directory: str) -> bool:
    """Whether `directory` exists or can be created, and be written to; nothing is created."""
    place = os.path.abspath(directory)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)

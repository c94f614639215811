"""Where this machine's profile is kept: $OFFLOAD_PROFILE, or hardware.json in the user's configuration directory."""

from __future__ import annotations

import os

from offload.errors import ConfigError
from offload.planner.hardware import Hardware, load_hardware


def profile_path() -> str:
    """The path; nothing need be there."""
    chosen = os.environ.get("OFFLOAD_PROFILE")
    if chosen:
        return os.path.expanduser(chosen)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "offload", "hardware.json")


def stored_hardware(overrides: tuple[str, ...] = ()) -> Hardware:
    """This machine's profile, with overrides. Raises ConfigError where there is none yet, or it is damaged."""
    path = profile_path()
    if not os.path.isfile(path):
        raise ConfigError(
            f"{path}: this machine has no profile yet; run `offload probe --storage DIR`, or name a profile that "
            "comes with offload, such as rtx4090-4ssd"
        )
    return load_hardware(path, overrides)

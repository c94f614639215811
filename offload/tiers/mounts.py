"""What a directory is mounted from."""

from __future__ import annotations

import os

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
"""File systems that are DRAM."""


def mount_of(path: str) -> dict[str, str]:
    """File system and source of the mount that holds `path`; empty where it cannot be told."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            for line in file:
                left, _, right = line.partition(" - ")
                if left.split()[2] == wanted:
                    kind, source = right.split()[:2]
                    return {"file_system": kind, "device": source}
    except OSError:
        return {}
    return {}

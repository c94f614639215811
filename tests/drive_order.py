"""In which order files are put on the drive and get their names: what a power loss at any instant may leave."""

import os


def recorded(monkeypatch) -> list[tuple[str, str]]:
    """Filled from now on with `("sync", name)` of every file or directory and `("rename", name before)`."""
    done: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def synced(descriptor):
        sync(descriptor)
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def renamed(source, target):
        rename(source, target)
        done.append(("rename", os.path.basename(source)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    return done

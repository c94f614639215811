"""Ending a run that is not to be finished."""

from __future__ import annotations

import contextlib
import gc
import traceback

from offload.errors import OffloadError
from offload.runtime.engine import OffloadEngine


def abandon(engine: OffloadEngine) -> None:
    """Close `engine` without finishing decided updates: queued transfers are given up, the store is removed.

    With durability 'step' the store stays, with its last committed step. Waits only for the transfers the kernel has
    already been given, so that a stopped run ends soon on a slow drive. Errors of the others are not raised.
    """
    store = engine._assembly.resources.store
    engine.saves.give_up()
    if engine.commits is not None:
        engine.commits.join()  # a step whose record is being written is not lost
    if store is not None:
        store.cancel()
    with contextlib.suppress(OffloadError, OSError, ValueError):
        engine.close()


def forget_frames(error: BaseException) -> None:
    """Drop what the functions that `error` has left still hold, such as a store that was being filled.

    A store that nobody holds removes its files.
    """
    traceback.clear_frames(error.__traceback__)
    gc.collect()

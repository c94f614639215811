"""A save that goes on beside training: what an update is about to overwrite is copied before it.

[Note: copied before overwritten] The state to be saved is that of the step boundary. A block's update in the next step
overwrites it (with durability 'step' only the one after that does, for an update writes the other set of extents). So
that update waits until the block has been copied; blocks are copied in the order in which updates come, and one that an
update waits for goes first. Nothing else waits. Until it is waited for, a copy takes at most half of the drives' time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from offload.checkpoint.copying import Item, StreamingCopy
from offload.errors import OffloadError, StoreError
from offload.stores.block_store import BlockRecord
from offload.threads import JoinableThread

logger = logging.getLogger("offload")


class SaveBeside:
    """From `start` on, copies `items` in a thread, then calls `complete`; `abandon` when that fails.

    `order` is that of the updates. `on_sides`: what is copied are the committed sides of blocks that have two.
    """

    def __init__(
        self,
        items: list[Item],
        order: list[BlockRecord],
        on_sides: bool,
        copy: StreamingCopy,
        complete: Callable[[], None],
        abandon: Callable[[], None],
    ) -> None:
        self._remaining: dict[int, deque[Item]] = {block.index: deque() for block in order}
        for item in items:
            self._remaining[item.block.index].append(item)
        self._copied = {index: threading.Event() for index in self._remaining}
        self._generations = {b.index: b.sides.generation for b in order if on_sides and b.sides is not None}
        self._wanted: int | None = None
        self._copy, self._complete, self._abandon = copy, complete, abandon
        self._failure: BaseException | None = None
        self._given_up = False
        self._thread = JoinableThread(self._run, name="offload-save")

    # ---- of the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (index := self._next()) is not None:
                if self._given_up:
                    raise StoreError("a checkpoint was being written when the run was stopped: it is removed")
                begin_s = time.monotonic()
                items = self._remaining[index]
                if items:
                    self._copy.add(items.popleft())
                if not items:
                    self._copy.finish_reads()
                    del self._remaining[index]
                    self._copied[index].set()
                if self._wanted is None:
                    time.sleep(time.monotonic() - begin_s)
            self._copy.finish()
            self._complete()
        except BaseException as error:
            self._failure = error
            self._abandon()
            if not self._given_up:
                logger.warning("a checkpoint could not be written, training goes on: %s", error)
        finally:
            for event in self._copied.values():
                event.set()

    def _next(self) -> int | None:
        wanted = self._wanted
        return wanted if wanted in self._remaining else next(iter(self._remaining), None)

    # ---- of training -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def before_update(self, block: BlockRecord) -> None:
        """Return when an update may be submitted. See [Note: copied before overwritten]."""
        if block.sides is not None and self._generations.get(block.index) == block.sides.generation:
            return  # it writes the other side
        event = self._copied[block.index]
        if not event.is_set():
            self._wanted = block.index
            event.wait()
            self._wanted = None

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._thread.ended

    @property
    def read_nbytes(self) -> int:
        """Read from the store so far."""
        return self._copy.source_read_nbytes

    def give_up(self) -> None:
        """The run is being stopped: end soon, and leave nothing of it."""
        self._given_up = True

    def wait(self) -> None:
        """Until it is complete. Raises StoreError when it could not be written; what was there is intact."""
        self._wanted = -2  # none, but in a hurry
        self._thread.join()
        failure, self._failure = self._failure, None
        if isinstance(failure, OffloadError):
            raise failure
        if failure is not None:
            raise StoreError(
                f"a checkpoint could not be written: {failure}; those before it are intact: remedy the cause and save "
                "again"
            ) from failure

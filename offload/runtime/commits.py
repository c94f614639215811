"""Durability `step`: every optimizer step becomes the committed one by a small record, or leaves no trace.

[Note: commit order] The updates of step n write the sides that step n - 1 has not committed. When all of them have
been written: fdatasync; then the record of step n (which sides, their checksums, step counts, training state) goes to
the one of two slots that does not hold the record of step n - 1; fdatasync. Only then may an update of step n + 1
write. A thread does this beside the forward pass of step n + 1. Updates that are due before it has ended are read and
computed meanwhile, in as many chunks as there are chunk buffers: what they have made waits at `gate`, nobody else does.
A run that goes on with the store of another flushes first: the other may have been killed before the second fdatasync.

[Note: when state is read] What forward draws from or changes (random states, data positions, buffers) is read when
`optimizer.step()` ends, before the next batch is drawn. What follows the step in the user's loop (learning rates and
their schedulers) is read when the next forward begins, or at the next flush. Both are states of the same boundary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from offload.errors import StoreError, UsageError
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.training_state import Stateful, persistent_buffers, random_states
from offload.runtime.verification import Verification
from offload.stores.block_store import BlockRecord
from offload.stores.sides import Sides, record_nbytes
from offload.stores.state_image import chunks_of, param_piece, state_piece
from offload.threads import JoinableThread
from offload.tiers.durable_files import naming
from offload.tiers.encoding import dtype_name, encode
from offload.tiers.host import HostArena
from offload.tiers.manifest import Rule, fingerprint, frame, pack_checksums
from offload.tiers.storage import Store
from offload.transfer.io_engine import Ticket, crc32c
from offload.types import PAGE_NBYTES, BlockState, round_up
from offload.update_rules import ADAMW

LAYOUT_KIND, RECORD_KIND = "offload-store", "offload-commit"


def follows_the_step(item: Any) -> bool:
    """Whether it is moved on after `optimizer.step()`, as LR schedulers are, and not before the next batch."""
    return isinstance(item, torch.optim.lr_scheduler.LRScheduler) or hasattr(item, "optimizer")


class StepCommits:
    """`blocks` begin with the root. `tracked` is the engine's, and may grow."""

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: list[BlockRecord],
        store: Store,
        chunk_elements: int,
        tracked: Mapping[str, Stateful],
        verification: Verification,
    ) -> None:
        self._model, self._blocks, self._store, self._tracked = model, blocks, store, tracked
        self._chunk_elements = chunk_elements
        self.verification = verification
        rules = {b.rule for block in blocks for b in block.layout.buffers}
        self._rule = next(iter(rules), ADAMW)
        self._slot_nbytes = record_nbytes([b.layout for b in blocks], chunk_elements)
        self._slots = [store.allocate(self._slot_nbytes) for _ in range(2)]
        self._record = HostArena(self._slot_nbytes)
        self.sequence = 0
        """Records written by this store."""
        self.started = False
        self._early: dict[str, Any] | None = None
        self._step_counts: dict[int, int] = {}
        self._thread: JoinableThread | None = None
        self._failure: BaseException | None = None
        self._on_drives = Ticket()
        """Completes when the record being written is on the drives, or has failed."""
        self._updates_ended = False

    @staticmethod
    def _sides(block: BlockRecord) -> Sides:
        if block.sides is None:
            raise UsageError(f"block {block.name} has one set of extents only; please report this")
        return block.sides

    # ---- the first record --------------------------------------------------------------------------------------

    def start(self, optimizer: OffloadOptimizer) -> None:
        """Make the present state one to roll back to: what is in memory is written, everything is summed.

        It gets no record: before the first step there is nothing that a new run would not have too.
        """
        self._sum_and_write()
        self._step_counts = optimizer.all_steps()
        self.started = True

    def go_on_from(
        self,
        optimizer: OffloadOptimizer,
        sequence: int,
        sides: list[int],
        generations: list[int],
        checksums: list[list[Any]],
    ) -> None:
        """The store has become one that ends with this record; bring what is used from host memory up to it.

        `checksums`: of each block's buffers, uint32 of shape (chunks, 2) of the side that the record names.
        """
        self.wait()
        with naming(self._store.paths[0]):  # see [Note: commit order]
            self._sync()
        for block, side, generation, of_buffers in zip(
            self._blocks, sides, generations, checksums, strict=True
        ):
            own = self._sides(block)
            for position, sums in enumerate(of_buffers):
                for table in own.checksums[
                    position
                ]:  # a frozen buffer's sides are alike; others are made anew
                    table[:] = sums
            own.generation, own.verifies = generation, self.verification.on
            own.commit(side, generation)
            block.turn(side)
            self._reread(block)
        self.sequence, self.started, self._early = sequence, True, None
        self._step_counts = optimizer.all_steps()

    def replace(self) -> None:
        """All state is about to be written anew: to the sides that are not committed."""
        self.wait()
        for block in self._blocks:
            sides = self._sides(block)
            sides.verifies = False
            if self.sequence:
                block.turn(1 - sides.committed)

    def replaced(self, optimizer: OffloadOptimizer) -> None:
        """All state has been written anew: commit it."""
        self.start(optimizer)
        self.step_ended(optimizer)
        self.begin(optimizer)
        self.wait()

    def _sum_and_write(self) -> None:
        """Bring the current side on storage up to what is in memory, and take every checksum."""
        buffers = [buffer for block in self._blocks for buffer in block.layout.buffers]
        arena = HostArena(
            max((b.record_nbytes(self._chunk_elements) for b in buffers if b.trainable), default=0)
            + self._chunk_elements * max((b.dtype.itemsize for b in buffers), default=4)
        )
        for block in self._blocks:
            sides = self._sides(block)
            for position, buffer in enumerate(block.layout.buffers):
                plane_offsets = [offset + buffer.plane_offset_nbytes for offset in sides.param_offsets]
                for chunk in chunks_of(buffer, self._chunk_elements):
                    sums = sides.checksums[position][sides.current][chunk.index]
                    at = chunk.start * buffer.dtype.itemsize
                    # A frozen plane is never updated: it is put on both sides.
                    targets = plane_offsets if not buffer.trainable else [plane_offsets[sides.current]]
                    sums[0] = self._put(param_piece(block, buffer, chunk), arena, [t + at for t in targets])
                    if not buffer.trainable:
                        sides.checksums[position][sides.other][chunk.index] = sums
                        continue
                    piece = state_piece(block, position, chunk)
                    target = sides.state_offsets[position][sides.current]
                    target += buffer.record_begin(chunk.index)
                    sums[1] = self._put(piece, arena, [target])
            sides.verifies = self.verification.on

    def _put(self, piece: Any, arena: HostArena, targets: list[int]) -> int:
        """Write a piece to each of the targets that it is not at; its checksum."""
        engine, nbytes = self._store.engine, round_up(piece.nbytes, PAGE_NBYTES)
        if nbytes == 0:
            return 0
        if piece.memory is None:
            engine.read(arena.address, nbytes, piece.offset).wait()
        else:
            arena.bytes_tensor[: piece.nbytes].copy_(piece.memory)
            arena.bytes_tensor[piece.nbytes : nbytes].zero_()
        for target in targets:
            if target != piece.offset:
                engine.write(arena.address, nbytes, target).wait()
        return crc32c(arena.address, piece.nbytes)

    def layout(self) -> dict[str, Any]:
        """What a reader needs beside a commit record (`checkpoint/kept_store.py`)."""
        return {
            "fingerprint": fingerprint(
                (s.name, s.shape, b.trainable)
                for x in self._blocks
                for b in x.layout.buffers
                for s in b.segments
            ),
            "files": [path.rpartition("/")[2] for path in self._store.paths],
            "stripe_nbytes": self._store.stripe_nbytes,
            "nbytes": self._store.capacity_nbytes,
            "chunk_elements": self._chunk_elements,
            "rule": Rule.of(self._rule).model_dump(),
            "slots": self._slots,
            "slot_nbytes": self._slot_nbytes,
            "blocks": [
                {
                    "name": block.name,
                    "buffers": [
                        {
                            "dtype": dtype_name(buffer.dtype),
                            "trainable": buffer.trainable,
                            "n_elements": buffer.n_elements,
                            "param_offsets": [
                                o + buffer.plane_offset_nbytes for o in self._sides(block).param_offsets
                            ],
                            "state_offsets": list(self._sides(block).state_offsets.get(position, ())) or None,
                            "parameters": [
                                {"name": s.name, "start": s.start, "shape": list(s.shape)}
                                for s in buffer.segments
                            ],
                        }
                        for position, buffer in enumerate(block.layout.buffers)
                    ],
                }
                for block in self._blocks
            ],
        }

    # ---- every step --------------------------------------------------------------------------------------------

    def step_ended(self, optimizer: OffloadOptimizer) -> None:
        """`optimizer.step()` is over: read what the next batch and the next forward will change."""
        self._early = {
            "random": encode(random_states()),
            "buffers": encode(persistent_buffers(self._model)),
            "tracked": {
                n: encode(t.state_dict(), n) for n, t in self._tracked.items() if not follows_the_step(t)
            },
        }
        self._step_counts = optimizer.all_steps()
        if self.verification.step_ended():
            for block in self._blocks:
                self._sides(block).verifies = False

    @property
    def due(self) -> bool:
        """A step has ended whose record is not being written yet."""
        return self._early is not None

    def next_forward(self, optimizer: OffloadOptimizer) -> None:
        """A forward begins: the first one starts it all, each later one commits the step before, if it can be. Raises
        StoreError where no process could resume from the files any more: here, between two steps, all can be saved."""
        if not self.started:
            self.start(optimizer)
        if self.due:
            self._store.refuse_deleted()
        if self.due and not any(block.pending_update for block in self._blocks):
            self.begin(optimizer)

    def join(self) -> None:
        """Let the thread end, whatever becomes of the record."""
        if self._thread is not None:
            self._thread.join()

    def begin(self, optimizer: OffloadOptimizer) -> None:
        """All updates of the step have been submitted: let a thread write the record once they have ended."""
        early, self._early = self._early, None
        if early is None:
            return
        self.wait()
        tracked = dict(early["tracked"])
        tracked |= {n: encode(t.state_dict(), n) for n, t in self._tracked.items() if follows_the_step(t)}
        training = {
            "dict": [
                ["optimizer", encode(optimizer.hyperparameters())],
                ["random", early["random"]],
                ["buffers", early["buffers"]],
                ["tracked", {"dict": [[name, state] for name, state in tracked.items()]}],
            ]
        }
        record = {
            "sequence": self.sequence + 1,
            "step": optimizer.steps_made,
            "sides": [self._sides(b).current for b in self._blocks],
            "generations": [self._sides(b).generation for b in self._blocks],
            "steps": [
                [[optimizer.steps_of(s.parameter) for s in buffer.segments] for buffer in b.layout.buffers]
                for b in self._blocks
            ],
            "training": training,
        }
        updates = [t for b in self._blocks if b.state is BlockState.UPDATING for t in b.tickets]
        self._on_drives, self._updates_ended = Ticket(), False
        statistics = functools.partial(optimizer.statistics, self._step_counts)
        self._thread = JoinableThread(
            functools.partial(self._write, record, updates, statistics), name="offload-commit"
        )
        self._thread.start()

    def _write(
        self, record: dict[str, Any], updates: list[Ticket], statistics: Callable[[], dict[str, Any]]
    ) -> None:
        # See [Note: commit order].
        try:
            for ticket in updates:
                ticket.wait()
            self._updates_ended = True
            record["training"]["dict"] += [[name, encode(value)] for name, value in statistics().items()]
            record["checksums"] = [
                [pack_checksums(of[side]) for _, of in sorted(self._sides(b).checksums.items())]
                for b, side in zip(self._blocks, record["sides"], strict=True)
            ]
            content = frame(RECORD_KIND, json.dumps(record))
            nbytes = round_up(len(content), PAGE_NBYTES)
            if nbytes > self._slot_nbytes:
                raise UsageError(
                    f"the training state of a step takes {len(content)} bytes, {self._slot_nbytes} are kept for it: "
                    "track less, or use durability='checkpoint'"
                )
            self._sync()
            if record["sequence"] == 1:
                self._store.describe(frame(LAYOUT_KIND, json.dumps(self.layout())))
            self._record.bytes_tensor[:nbytes].zero_()
            self._record.bytes_tensor[: len(content)] = torch.from_numpy(
                np.frombuffer(content, np.uint8).copy()
            )
            slot = self._slots[record["sequence"] % 2]
            self._store.engine.write(self._record.address, nbytes, slot).wait()
            self._sync()
            self.sequence += 1
            for block, side, generation in zip(
                self._blocks, record["sides"], record["generations"], strict=True
            ):
                self._sides(block).commit(side, generation)
        except BaseException as error:
            self._failure = error
            self._on_drives.complete(f"a step could not be committed: {error}")
        else:
            self._on_drives.complete()

    def _sync(self) -> None:
        self._store.engine.sync()

    def gate(self) -> Ticket | None:
        """What the writes of an update that begins now have to wait for; None: nothing.

        Never one that waits for updates still to be made, which that update may hold up: these are waited for here.
        """
        if self._thread is not None and not self._updates_ended:
            self.wait()
        self.check()
        return None if self._thread is None or self._on_drives.done() else self._on_drives

    def wait(self) -> None:
        """Return when the record being written is on the drives. Raises StoreError when it could not be written."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        self.check()

    def check(self) -> None:
        """Raise StoreError when a record could not be written."""
        if self._failure is not None:
            raise StoreError(
                f"a step could not be committed: {self._failure}; the step before it is intact: remedy the cause, then "
                "offload.resume from this storage directory"
            ) from self._failure

    # ---- no step -----------------------------------------------------------------------------------------------

    def roll_back(self, optimizer: OffloadOptimizer) -> list[BlockRecord]:
        """Return every block to its committed side, in memory too. No update may be in flight. The blocks changed."""
        self.wait()
        changed = [block for block in self._blocks if self._sides(block).roll_back()]
        for block in changed:
            block.turn(self._sides(block).committed)
            self._reread(block)
        optimizer.roll_back(self._step_counts)
        return changed

    def _reread(self, block: BlockRecord) -> None:
        """What is used from host memory, from the committed side."""
        sides, engine = self._sides(block), self._store.engine
        if block.param_offset < 0 and block.slot is not None:
            nbytes = round_up(block.layout.slot_nbytes, PAGE_NBYTES)
            engine.read(block.slot.bytes_tensor.data_ptr(), nbytes, sides.param_offsets[sides.current]).wait()
        for position, extents in block.states.items():
            if extents.host is not None:
                offset = sides.state_offsets[position][sides.current]
                engine.read(extents.host.data_ptr(), extents.host.numel(), offset).wait()

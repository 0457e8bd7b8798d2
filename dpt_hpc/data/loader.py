"""Batches made ahead of time, by threads beside the one that trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Any

import numpy as np

from dpt_hpc.data.store import Store
from dpt_hpc.data.tables import Indices, Tables
from dpt_hpc.stopwatch import part
from dpt_hpc.structure import Batch

STEPS_AHEAD = 4
WINDOWS_AT_ONCE = 2
"""The window that batches are packed from, and the next one, which is fetched meanwhile."""
GLANCE = 0.2
"""Seconds after which a waiting thread looks whether it is still wanted."""


@dataclass(frozen=True)
class Step:
    """The structures of one step. parts[m][r]: those of micro-batch m and rank r; may be empty. rank: ours."""

    number: int
    parts: Sequence[Sequence[Indices]]
    rank: int = 0

    @property
    def mine(self) -> list[Indices]:
        """This rank's part of each micro-batch."""
        return [micro[self.rank] for micro in self.parts]

    @property
    def structures(self) -> Indices:
        """All structures of the step."""
        return np.concatenate([share for micro in self.parts for share in micro])


class Loader:
    """This rank's batches of the steps of some windows, in order: `for step, batches in loader`.

    windows: for each, its steps; asked for one after the other in a thread of the loader's own. One thread fetches what
    this rank needs of the next window (one window ahead, not more), another packs batches (a few steps ahead), so that
    training waits only for data that are late. waited: seconds for which it did. Use it in a `with`: leaving ends the
    threads, also in the middle of a window. An error in a thread is raised where the batch was asked for.
    """

    def __init__(self, store: Store, windows: Iterable[Sequence[Step]]) -> None:
        self.waited = 0.0
        self._store = store
        self._windows = iter(windows)
        self._room = threading.Semaphore(WINDOWS_AT_ONCE)
        self._stop = threading.Event()
        self._fetched: Queue[tuple[Sequence[Step], Tables] | BaseException | None] = Queue(WINDOWS_AT_ONCE)
        self._packed: Queue[tuple[Step, list[Batch]] | BaseException | None] = Queue(STEPS_AHEAD)
        # Daemons: a process that must end does not wait for a disk, or another node, that never answers.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._fetch, self._pack)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[Step, list[Batch]]]:
        while True:
            began = time.monotonic()
            with part("data"):
                item = self._packed.get()
            self.waited += time.monotonic() - began
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if kind is None:
            for thread in self._threads:
                thread.join()

    def _fetch(self) -> None:
        try:
            while self._free() and (steps := next(self._windows, None)) is not None:
                wanted = [share for step in steps for share in step.mine]
                tables = self._store.fetch(np.concatenate(wanted) if wanted else np.empty(0, dtype=np.int64))
                self._put(self._fetched, (steps, tables))
                del tables  # else this thread would hold a third window while it fetches
            self._put(self._fetched, None)
        except BaseException as error:
            self._put(self._fetched, error)

    def _pack(self) -> None:
        try:
            while isinstance(item := self._take(), tuple):
                steps, tables = item
                for step in steps:
                    if self._stop.is_set():
                        return
                    self._put(self._packed, (step, [tables.batch(share) for share in step.mine]))
                del item, tables
                self._room.release()
            self._put(self._packed, item)
        except BaseException as error:
            self._put(self._packed, error)

    def _free(self) -> bool:
        """Wait until another window may be in memory; False if it is not wanted any more."""
        while not self._stop.is_set():
            if self._room.acquire(timeout=GLANCE):
                return True
        return False

    def _take(self) -> tuple[Sequence[Step], Tables] | BaseException | None:
        while not self._stop.is_set():
            try:
                return self._fetched.get(timeout=GLANCE)
            except Empty:
                continue
        return None

    def _put(self, queue: Queue[Any], item: Any) -> None:
        while not self._stop.is_set():
            try:
                queue.put(item, timeout=GLANCE)
            except Full:
                continue
            return


def in_windows(indices: Indices, batch_size: int, window: int) -> Iterator[list[Step]]:
    """The structures `indices` (S,) in their order, `batch_size` at a time, in windows of about `window` structures."""
    return parts_in_windows((indices[at : at + batch_size] for at in range(0, len(indices), batch_size)), window)


def parts_in_windows(parts: Iterable[Indices], window: int) -> Iterator[list[Step]]:
    """Each of `parts` as a batch, in their order, in windows of at most `window` structures or one part."""
    steps: list[Step] = []
    held = 0
    for number, structures in enumerate(parts):
        if steps and held + len(structures) > window:
            yield steps
            steps, held = [], 0
        steps.append(Step(number, [[structures]]))
        held += len(structures)
    if steps:
        yield steps

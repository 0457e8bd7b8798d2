"""Where the time of a step goes, for whoever measures it: parts that stand in the code, and cost nothing unmeasured.

    with part("graph"):
        ...                  # nothing happens here, unless somebody around runs a `Stopwatch`

Parts may lie within each other: each counts what it does itself, so that parts add up to the time measured.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_UNMEASURED: AbstractContextManager[None] = nullcontext()
_running: Stopwatch | None = None


class Stopwatch:
    """Seconds by part, how often each was entered, and whatever else was counted meanwhile.

    settle: called wherever a part begins or ends; on a GPU it must wait for the kernels in flight, whose time would
    else be counted in a later part.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.entries: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._settle = settle
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def run(self) -> Iterator[Stopwatch]:
        """Measure what happens inside, in this process. What no part covers is "other"."""
        global _running
        if _running is not None:
            raise RuntimeError("Stopwatch.run: another stopwatch is running")
        _running = self
        try:
            with self.part("other"):
                yield self
        finally:
            _running = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`, and no longer as the part around it."""
        self._turn()
        self._open.append(name)
        self.entries[name] += 1
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        self._settle()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def part(name: str) -> AbstractContextManager[None]:
    """What happens inside is `name` to a stopwatch that runs; without one it is free."""
    return _UNMEASURED if _running is None else _running.part(name)


def measuring() -> bool:
    """Whether a stopwatch runs."""
    return _running is not None


def count(name: str, amount: int = 1) -> None:
    """Add `amount` to what a stopwatch that runs has counted as `name`."""
    if _running is not None:
        _running.counts[name] += amount

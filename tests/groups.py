"""Ranks that are threads of the test: every call among them is a real meeting of all."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class ThreadRank:
    """One of `size` threads."""

    def __init__(self, rank: int, values: list[Any], meeting: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(values)
        self._values = values
        self._meeting = meeting

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks; fails if one does not come."""
        self._values[self.rank] = value
        self._meeting.wait()
        gathered = list(self._values)
        self._meeting.wait()
        return gathered


def nodes_of(sizes: Sequence[int]) -> list[ThreadRank]:
    """The group of its node for each rank of a run whose nodes have so many ranks."""
    made = []
    for size in sizes:
        values, meeting = [None] * size, threading.Barrier(size, timeout=20)
        made += [ThreadRank(rank, values, meeting) for rank in range(size)]
    return made


def on_ranks(size: int, work: Callable[[ThreadRank], Result]) -> list[Result | BaseException]:
    """What `work` returns or raises on each of `size` ranks that run it together."""
    values: list[Any] = [None] * size
    meeting = threading.Barrier(size, timeout=20)
    with ThreadPoolExecutor(size) as pool:
        started = [pool.submit(work, ThreadRank(rank, values, meeting)) for rank in range(size)]
    return [future.exception() or future.result() for future in started]


def refused(results: list[object], kind: type[BaseException], message: str) -> None:
    """Every rank was told the same."""
    for result in results:
        assert isinstance(result, kind), result
        assert re.search(message, str(result)), result

"""What loading data needs of the other ranks, whoever connects them: who they are, and to agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from dpt_hpc.errors import DptError

Result = TypeVar("Result")


class Group(Protocol):
    """Some ranks that make the same calls in the same order."""

    rank: int
    size: int

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks in their order, on every rank."""


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """That one value."""
        return [value]


ALONE = Alone()


def agree(group: Group, work: Callable[[], Result]) -> Result:
    """What `work` returns here. An error of one rank is raised on all: none waits for one that has given up."""
    fault: DptError | None = None
    try:
        result = work()
    except DptError as error:
        fault = error
    for found in group.all_gather(fault):
        if found is not None:
            raise found
    return result

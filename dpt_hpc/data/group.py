"""What loading data needs of the other ranks, whoever connects them: who they are, and to agree."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from dpt_hpc.errors import DptError, EnvironmentFault

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
    """What `work` returns here. An error of one rank is raised on all: none waits for one that has given up.

    One that is not a DptError (no memory, a mistake in the program) is raised as it is where it happened, and as an
    EnvironmentFault that names the rank on the others.
    """
    fault: DptError | None = None
    own: Exception | None = None
    try:
        result = work()
    except DptError as error:
        fault = error
    except Exception as error:
        own = error
        fault = EnvironmentFault(
            f"rank {group.rank} of {group.size} on {os.uname().nodename}: {type(error).__name__}: {error}.\n"
            "That rank's own message says more."
        )
    for found in group.all_gather(fault):
        if found is not None:
            raise own or found
    return result

"""The edge budget of a run: how many edges a micro-batch may have, as it was set or as the memory allows."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from dpt_hpc.data.sampler import Sampler
from dpt_hpc.data.shared_memory import free_memory, status_bytes
from dpt_hpc.data.tables import Indices
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.ranks import Ranks

LEARNING_STEPS = 4
GROWTH = 4
"""How many times the edges of the fullest micro-batch up to now the next one may have, while the budget is learnt."""
LEAST_TAKEN = 8 << 20
"""Bytes below which a measurement says nothing about edges: so much is taken to have been taken."""
SHARE = 0.8
"""Of the memory that is free when training begins; the rest is for what is not proportional to edges."""

NAMED = 8
"""Structures that a warning names; the others it counts."""


class Memory(ABC):
    """What training takes from the memory of its device, from the moment on at which this is made.

    room: bytes that this rank could take at that moment.
    """

    room: int

    @abstractmethod
    def taken(self) -> int:
        """Bytes taken since then, at the most."""


class HostMemory(Memory):
    """The memory of the node, or of the part of it that the job's cgroup gives, divided by the ranks there; or what
    `ulimit` leaves to each."""

    def __init__(self, local_world_size: int) -> None:
        with suppress(OSError, AttributeError):  # another C library: what it kept for later use goes unseen
            ctypes.CDLL(None).malloc_trim(0)
        self.room = free_memory(local_world_size)
        with suppress(OSError):  # else an earlier peak counts too, and the budget becomes smaller than it could be
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = status_bytes("VmRSS")

    def taken(self) -> int:
        return status_bytes("VmHWM") - self._before


class DeviceMemory(Memory):
    """The memory of a GPU that one rank has for itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - self._before
        self.room = torch.cuda.mem_get_info(device)[0] + cached

    def taken(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before


def memory_of(device: torch.device, ranks: Ranks) -> Memory:
    """That of the device on which this rank trains."""
    return DeviceMemory(device) if device.type == "cuda" else HostMemory(ranks.node.size)


class EdgeBudget:
    """Sets `sampler.edge_budget`: to what the config says, or (auto) to what the first steps show to fit.

    Learning begins with the edges of the largest structure, which must fit in any case, and lets them grow by a few
    times a step, measuring the memory they take: no step is a leap into the unknown, and the budget ends as at most
    GROWTH ** LEARNING_STEPS (256) times the edges of that structure. All ranks have the same budget.
    """

    def __init__(
        self, option: int | Literal["auto"] | None, sampler: Sampler, ranks: Ranks, device: torch.device
    ) -> None:
        self._option, self._sampler, self._ranks, self._device = option, sampler, ranks, device
        self._memory: Memory | None = None
        self._edges = 0
        self.steps_to_learn = LEARNING_STEPS if option == "auto" else 0
        self._least = max(int(sampler.edges[sampler.indices].max()), 1)
        sampler.edge_budget = self._least if option == "auto" else option

    def watch(self, memory: Memory | None = None) -> None:
        """Begin to measure, if there is something to learn; before an epoch's steps. memory: the device's."""
        if self.steps_to_learn:
            self._memory = memory or memory_of(self._device, self._ranks)
            self._edges = 0  # those of an earlier epoch do not belong to the peak that begins now

    def learn(self, edges: int) -> bool:
        """After a step: `edges` were in this rank's fullest micro-batch. Whether the budget changed; collective."""
        if self.steps_to_learn == 0 or self._memory is None:
            return False
        self.steps_to_learn -= 1
        self._edges = max(self._edges, edges)
        before = self._sampler.edge_budget or 1
        # The peak and the edges are both the highest since watching began, so they belong together.
        fits = int(SHARE * self._memory.room * max(self._edges, 1) / max(self._memory.taken(), LEAST_TAKEN))
        told = self._ranks.all_gather((fits, self._edges))
        # Never far beyond what has been measured, also where the steps are smaller than the memory.
        tried = max(self._least, *(edges for _, edges in told))
        self._sampler.edge_budget = rounded_down(max(min(GROWTH * tried, *(fits for fits, _ in told)), 1))
        return self._sampler.edge_budget != before

    def halve(self, *, repeatable: bool) -> None:
        """After a GPU ran out of memory: so that its step can be repeated in smaller micro-batches.

        repeatable: whether it can; ranks that wait in the middle of the step cannot go back. Raises EnvironmentFault
        where halving does not help: also without a budget, and if the smallest structure alone is too large.
        """
        budget = self._sampler.edge_budget
        where = f"rank {self._ranks.rank}: out of memory on {self._device}"
        if budget is None:
            raise EnvironmentFault(f"{where}.\nSet training.edge_budget to auto, or to a number of edges, and resume.")
        if budget <= max(int(self._sampler.edges[self._sampler.indices].min()), 1):
            raise EnvironmentFault(f"{where} with one structure at a time.\nUse a smaller network, or a larger GPU.")
        if not repeatable:
            raise EnvironmentFault(
                f"{where} with micro-batches of up to {budget} edges.\nResume with training.edge_budget={budget // 2}."
            )
        self._sampler.edge_budget = budget // 2
        self.steps_to_learn = 0

    def above(self, ids: Callable[[Indices], Sequence[str]]) -> str | None:
        """A warning that names the structures above the budget, if there are any. ids: of structures by index."""
        above = self._sampler.above_budget()
        if len(above) == 0:
            return None
        named = ", ".join(ids(above[:NAMED])) + (", ..." if len(above) > NAMED else "")
        return (
            f"{len(above)} structure(s) have more edges than the edge budget, {self._sampler.edge_budget}, and are "
            f"computed alone: {named}"
        )

    def state(self) -> dict[str, Any] | None:
        """For the checkpoint, if it is learnt: a resumed run must make the same micro-batches."""
        if self._option != "auto":
            return None
        edges, steps = self._sampler.edge_budget, self.steps_to_learn
        return {"edges": edges, "steps_to_learn": steps, "world_size": self._ranks.size}

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on with what was learnt, if as many ranks learnt it: others have another share of the memory."""
        if self._option == "auto" and state is not None and state["world_size"] == self._ranks.size:
            self._sampler.edge_budget, self.steps_to_learn = state["edges"], state["steps_to_learn"]


def rounded_down(edges: int) -> int:
    """To three binary digits, so that the noise of a measurement seldom gives two runs different budgets."""
    unit = 1 << max(edges.bit_length() - 3, 0)
    return edges // unit * unit

"""Batches to an edge budget, filled from a stream of structures and taken apart again, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from dpt_hpc.errors import DataError, EnvironmentFault
from dpt_hpc.models import Scaling
from dpt_hpc.models.derivatives import build_graph
from dpt_hpc.ops import RadiusGraph
from dpt_hpc.structure import Batch, Structure
from dpt_hpc.use.structures import edges_to_expect, spanning

Result = TypeVar("Result")
Pair = tuple[Structure, Result]
OnFault = Callable[[str], None] | None
"""Told why a structure is left out; None where it is not, but ends the work."""
Compute = Callable[[list[Structure], RadiusGraph, Batch], list[Result]]
"""From the structures of a batch, their graph and the batch to a result for each."""

EDGE_BUDGET = 400_000
"""Of a batch: some 100 MB with the networks here, forces and stress included."""


@dataclass(frozen=True)
class Batching(Generic[Result]):
    """How a stream of structures is computed: `compute` on batches of at most about `edge_budget` directed edges.

    on_fault: told of each structure that cannot be answered, which is left out; None to raise.
    """

    network: Scaling
    edge_budget: int
    compute: Compute[Result]
    on_fault: OnFault

    def run(self, structures: Iterable[Structure], check: Callable[[Structure], None]) -> Iterator[Pair[Result]]:
        """Each structure with its result, in order; one batch is in memory at a time.

        check: raises DataError for a structure that the network does not know. Raises DataError for one that it cannot
        answer, with its id; EnvironmentFault for one that does not fit into the memory of a GPU.
        """
        part: list[Structure] = []
        held = 0
        for structure in structures:
            try:
                check(structure)
            except DataError as error:
                if self.on_fault is None:
                    raise
                self.on_fault(str(error).partition("\n")[0])
                continue
            edges = edges_to_expect(structure, self.network.cutoff, self.network.max_neighbors)
            if part and held + edges > self.edge_budget:
                yield from self._computed(part)
                part, held = [], 0
            part.append(structure)
            held += edges
        yield from self._computed(part)

    def _computed(self, part: list[Structure]) -> Iterator[Pair[Result]]:
        """One batch, or its halves where it holds twice as many edges as expected, or more than the GPU's memory."""
        if not part:
            return
        parts = [part[: len(part) // 2], part[len(part) // 2 :]]
        try:
            found = self._at_once(part)
        except DataError as error:
            if error.structure is None:
                raise
            text = (
                str(error).removeprefix("radius_graph: ").replace(f" of structure {error.structure} of the batch", "")
            )
            text = f"{part[error.structure].structure_id or 'structure'}: {text}"
            if self.on_fault is None:
                raise DataError(text) from None
            self.on_fault(text.partition("\n")[0])
            found, parts = None, [part[: error.structure], part[error.structure + 1 :]]
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise EnvironmentFault(
                    f"{part[0].structure_id or 'structure'}: its {part[0].num_atoms} atoms do not fit into the memory "
                    f"of {self.network.scale.device}.\nUse device cpu, or leave out forces and stress."
                ) from None
            found = None
        if found is not None:
            yield from zip(part, found, strict=True)
            return
        for smaller in parts:
            yield from self._computed(smaller)

    def _at_once(self, part: list[Structure]) -> list[Result] | None:
        """The results of one batch; None if it has far more edges than were expected, and is to be divided."""
        scale = self.network.scale  # of the type and on the device of all weights
        with torch.no_grad():
            batch = Batch.from_structures([_filled(structure) for structure in part], scale.dtype).to(scale.device)
            graph = build_graph(self.network, batch)
            if len(part) > 1 and graph.num_edges > 2 * self.edge_budget:
                return None
            return self.compute(part, graph, batch)


def _filled(structure: Structure) -> Structure:
    cell = spanning(structure)
    return structure if cell is structure.cell else replace(structure, cell=cell)

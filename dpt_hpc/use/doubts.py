"""What makes a prediction doubtful, though there is one: said with the structure, once for each reason."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpt_hpc.models.derivatives import edge_vectors
from dpt_hpc.ops import RadiusGraph, radius_graph
from dpt_hpc.structure import SYMBOLS, Batch, Structure
from dpt_hpc.use.structures import has_stress

TOO_CLOSE = 0.5
"""Å. The shortest bond there is, that of H2, is 0.74 Å long."""
VACUUM = (
    "vacuum: no atom in {}, more than the network sees across: its stress is per volume of the cell, vacuum and all"
)


def doubts(
    structures: Sequence[Structure],
    graph: RadiusGraph,
    batch: Batch,
    cutoff: float,
    elements: Sequence[int],
    *,
    stress: bool,
) -> list[tuple[str, ...]]:
    """For each structure of a batch what its user should know of the numbers that follow, `reason` first.

    graph: that of the network, with `cutoff` (Å). elements: atomic numbers that the network was trained on. stress:
    whether it is among the numbers.
    """
    found: list[list[str]] = [[] for _ in structures]
    known = set(elements)
    for place, structure in enumerate(structures):
        unknown = sorted(set(structure.atomic_numbers.tolist()) - known)
        if unknown:
            names = ", ".join(SYMBOLS[z] for z in unknown)
            found[place].append(
                f"new elements: the network was not trained on {names}, and its answer is that of chance"
            )
        if not bool(structure.pbc.any()):
            found[place].append("not periodic: it has no stress, and a network that learnt crystals does not know it")
        elif stress and has_stress(structure):
            thick = [(axis, gap) for axis, gap in enumerate(gaps(structure)) if gap > cutoff]
            empty = [f"{gap:.3g} Å along lattice vector {'abc'[axis]}" for axis, gap in thick]
            found[place] += [VACUUM.format(", ".join(empty))] if empty else []
    _tell_close(found, structures, batch)
    _tell_lonely(found, structures, graph, batch, cutoff)
    return [tuple(texts) for texts in found]


def reason(doubt: str) -> str:
    """What kind of doubt it is: who tells many of them tells each kind for itself."""
    return doubt.partition(":")[0]


def gaps(structure: Structure) -> list[float]:
    """Å, along each axis of a cell with a volume: the thickest layer between lattice planes that holds no atom."""
    inverse = torch.linalg.inv(structure.cell)
    fractions = (structure.positions @ inverse).remainder(1.0).sort(dim=0).values
    between = torch.cat([fractions, fractions[:1] + 1.0]).diff(dim=0).amax(dim=0)
    found: list[float] = (between / torch.linalg.vector_norm(inverse, dim=0)).tolist()
    return found


def _tell_close(found: list[list[str]], structures: Sequence[Structure], batch: Batch) -> None:
    near = radius_graph(batch.positions, batch.cell, batch.pbc, batch.atom_ptr, cutoff=TOO_CLOSE)
    if not near.num_edges:
        return
    lengths = torch.linalg.vector_norm(edge_vectors(batch.positions, batch.cell, near, batch.batch), dim=1)
    sources, targets = near.edge_index.tolist()
    first, owner = batch.atom_ptr.tolist(), batch.batch.tolist()
    closest: dict[int, tuple[float, int, int]] = {}
    for length, source, target in zip(lengths.tolist(), sources, targets, strict=True):
        place = owner[target]
        pair = (length, min(source, target) - first[place], max(source, target) - first[place])
        closest[place] = min(closest.get(place, pair), pair)
    for place, (length, a, b) in closest.items():
        numbers = structures[place].atomic_numbers
        kinds = f"{SYMBOLS[int(numbers[a])]} and {SYMBOLS[int(numbers[b])]}"
        found[place].append(
            f"close atoms: {a} and {b} ({kinds}), {length:.3g} Å apart: a unit other than Å, or two atoms in one place?"
        )


def _tell_lonely(
    found: list[list[str]], structures: Sequence[Structure], graph: RadiusGraph, batch: Batch, cutoff: float
) -> None:
    lonely = (graph.target_ptr.diff() == 0).nonzero().flatten().tolist()
    first, owner = batch.atom_ptr.tolist(), batch.batch.tolist()
    told: dict[int, list[int]] = {}
    for atom in lonely:
        told.setdefault(owner[atom], []).append(atom - first[owner[atom]])
    for place, atoms in told.items():
        names = [f"{a} ({SYMBOLS[int(structures[place].atomic_numbers[a])]})" for a in atoms[:3]]
        more = f" and {len(atoms) - 3} more" if len(atoms) > 3 else ""
        found[place].append(
            f"no neighbour: there is no atom within {cutoff:g} Å of {', '.join(names)}{more}, "
            f"and so no force on {'them' if len(atoms) > 1 else 'it'}"
        )

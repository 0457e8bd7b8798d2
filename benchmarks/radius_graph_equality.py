"""Compare radius_graph with ASE and matscipy, edge by edge, on every structure of the files given and on nasty cells.

    python benchmarks/radius_graph_equality.py FILE... --out benchmarks/results/radius_graph_equality.json

For each structure and cutoff the full sets of (target, source, shift) are compared. Libraries round distances
differently, so a pair whose length is within 1e-9 Å of the cutoff may be in one list and not in the other: such pairs
are counted apart, as `boundary`, and everything else that differs is a mismatch. For each number in --nearest, the list
with that max_neighbors must be the full list, sorted by length and cut. Exits with 1 on any mismatch.

--nasty N makes N random cells: needles, flat ones of 0.5 Å, left-handed, sheared far from reduced, open axes, atoms
outside the cell, and cutoffs of up to 10 Å in cells of 2 Å.

ASE takes tens of milliseconds a structure; --ase-every 10 asks it about every tenth only, and the result says so. The
result is written after every file, and a run with the same --out goes on after the files that it holds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import torch
from ase.neighborlist import primitive_neighbor_list
from matscipy.neighbours import neighbour_list
from numpy.typing import NDArray

from dpt_hpc import _C
from dpt_hpc.ops import RadiusGraph, radius_graph

BOUNDARY = 1e-9  # Å
BATCH = 64
NASTY = "random nasty cells"


def read(path: Path) -> list[ase.Atoms]:
    """The structures of an extended XYZ file or of a JSON list (positions and cell, or JARVIS `atoms`)."""
    if ".json" not in path.suffixes:
        return list(ase.io.read(path, ":"))
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        records = json.load(file)
    if not isinstance(records, list):
        return []
    return [_atoms(record) for record in records]


def _atoms(record: dict[str, Any]) -> ase.Atoms:
    if "atoms" not in record:
        return ase.Atoms(record["atomic_numbers"], record["positions"], cell=record["cell"], pbc=True)
    jarvis = record["atoms"]
    symbols = [element.strip() for element in jarvis["elements"]]
    key = "positions" if jarvis["cartesian"] else "scaled_positions"
    return ase.Atoms(symbols, cell=jarvis["lattice_mat"], pbc=True, **{key: jarvis["coords"]})


def nasty(seed: int) -> tuple[ase.Atoms, float]:
    """A structure that breaks neighbour lists, and its cutoff in Å."""
    random = np.random.default_rng(seed)
    if seed % 20 == 0:  # one or two atoms in a cell of 2 Å
        fractions = random.uniform(-3, 3, (1 + seed // 20 % 2, 3))
        cell = 2 * np.eye(3) + random.uniform(-0.1, 0.1, (3, 3))
        return ase.Atoms(f"H{len(fractions)}", fractions @ cell, cell=cell, pbc=True), 10.0
    while True:
        if seed % 4 == 1:  # integer shears of a box
            cell = np.diag(random.uniform(1.5, 4, 3))
            for row, along in ((1, 0), (2, 0), (2, 1)):
                cell[row] += random.integers(-6, 7) * cell[along]
        else:
            cell = random.uniform(-1, 1, (3, 3)) * 10 ** random.uniform(-0.1, 1.5, (3, 1))
        if abs(np.linalg.det(cell)) > 1e-9 and (1 / np.linalg.norm(np.linalg.inv(cell), axis=0)).min() >= 0.5:
            break
    fractions = random.uniform(-0.3, 1.3, (random.integers(1, 9), 3))
    if random.random() < 0.5:
        fractions += random.integers(-9, 10, fractions.shape)
    atoms = ase.Atoms(f"H{len(fractions)}", fractions @ cell, cell=cell, pbc=random.random(3) < 0.8)
    return atoms, 10.0 if len(atoms) < 3 else 1.0 + seed % 6


def batched_graph(structures: list[ase.Atoms], cutoff: float, max_neighbors: int | None = None) -> RadiusGraph:
    return radius_graph(
        torch.tensor(np.concatenate([s.positions for s in structures])),
        torch.tensor(np.stack([s.cell.array for s in structures])),
        torch.tensor(np.stack([s.pbc for s in structures])),
        torch.tensor(np.cumsum([0] + [len(s) for s in structures])),
        cutoff,
        max_neighbors,
    )


def rows(target: NDArray, source: NDArray, shift: NDArray) -> NDArray[np.int64]:
    """One integer per edge: atoms in 20 bits each, shifts in 8 (all checked)."""
    assert max(target.max(initial=0), source.max(initial=0)) < 2**20
    assert abs(shift).max(initial=0) < 127
    key = target.astype(np.int64) << 44 | source.astype(np.int64) << 24
    for axis in range(3):
        key |= (shift[:, axis].astype(np.int64) + 128) << (16 - 8 * axis)
    return key


def edges_of(graph: RadiusGraph, first: int, last: int) -> NDArray[np.int64]:
    """The edges of one structure (atoms first .. last of its batch); must already be sorted and without repeats."""
    own = slice(int(graph.target_ptr[first]), int(graph.target_ptr[last]))
    source, target = (graph.edge_index[k, own].numpy() - first for k in (0, 1))
    key = rows(target, source, graph.cell_shifts[own].numpy())
    assert (key[1:] > key[:-1]).all(), "edges out of order or repeated"
    return key


def lengths(key: NDArray[np.int64], atoms: ase.Atoms) -> NDArray[np.float64]:
    target, source = key >> 44, key >> 24 & (2**20 - 1)
    shift = np.stack([(key >> bits & 255) - 128 for bits in (16, 8, 0)], axis=1)
    vectors = atoms.positions[source] - atoms.positions[target] + shift @ atoms.cell.array
    return np.linalg.norm(vectors, axis=1)


def peer_lists(atoms: ase.Atoms, cutoff: float, peers: list[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    for peer in peers:
        if peer == "matscipy":
            i, j, shift = neighbour_list("ijS", atoms, cutoff)
        else:
            i, j, shift = primitive_neighbor_list("ijS", atoms.pbc, atoms.cell.array, atoms.positions, cutoff)
        yield peer, rows(np.asarray(i), np.asarray(j), np.asarray(shift).reshape(-1, 3))


def cut_wrongly(structures: list[ase.Atoms], cutoff: float, graph: RadiusGraph, most: int) -> int:
    """Rows of the batch's list with max_neighbors that are not the nearest of the row of its full list.

    Lengths within 1e-9 Å of each other may stand in either order here; which of them stay is the tests' business.
    """
    cut = batched_graph(structures, cutoff, most)
    target, source = graph.edge_index[1].numpy(), graph.edge_index[0].numpy()
    shift = graph.cell_shifts.numpy()
    keys = rows(target, source, shift)
    kept = np.isin(keys, rows(cut.edge_index[1].numpy(), cut.edge_index[0].numpy(), cut.cell_shifts.numpy()))
    positions = np.concatenate([s.positions for s in structures])
    cells = np.repeat(np.stack([s.cell.array for s in structures]), [len(s) for s in structures], axis=0)
    vectors = positions[source] - positions[target] + np.einsum("ea,eax->ex", shift, cells[target])
    length = np.linalg.norm(vectors, axis=1)
    longest_kept, shortest_dropped = np.zeros(len(positions)), np.full(len(positions), np.inf)
    np.maximum.at(longest_kept, target[kept], length[kept])
    np.minimum.at(shortest_dropped, target[~kept], length[~kept])
    counts = np.bincount(target, minlength=len(positions))
    wrong = longest_kept > shortest_dropped + BOUNDARY
    wrong |= np.bincount(target[kept], minlength=len(positions)) != np.minimum(counts, most)
    wrong |= cut.target_ptr.diff().numpy() != np.minimum(counts, most)
    return int(wrong.sum()) + abs(int((counts > most).sum()) - cut.num_truncated)


def compare(
    structures: list[ase.Atoms], cutoff: float, peers: list[str], ase_every: int, nearest: list[int]
) -> tuple[dict[str, Any], list[str]]:
    tally: dict[str, Any] = {"structures": 0, "atoms": 0, "edges": 0}
    tally["nearest"] = {str(most): {"rows_cut": 0, "mismatches": 0} for most in nearest}
    tally |= {peer: {"structures": 0, "edges": 0, "mismatches": 0, "boundary": 0, "seconds": 0.0} for peer in peers}
    complaints = []
    for start in range(0, len(structures), BATCH):
        batch = structures[start : start + BATCH]
        graph = batched_graph(batch, cutoff)
        for most in nearest:
            wrong = cut_wrongly(batch, cutoff, graph, most)
            tally["nearest"][str(most)]["rows_cut"] += int((graph.target_ptr.diff() > most).sum())
            tally["nearest"][str(most)]["mismatches"] += wrong
            if wrong:
                complaints.append(f"structures from {start}, cutoff {cutoff}: {wrong} rows not the nearest {most}")
        first = 0
        for index, atoms in enumerate(batch, start):
            ours = edges_of(graph, first, first + len(atoms))
            first += len(atoms)
            tally["structures"] += 1
            tally["atoms"] += len(atoms)
            tally["edges"] += len(ours)
            began = time.perf_counter()
            asked = [peer for peer in peers if peer != "ase" or index % ase_every == 0]
            for peer, theirs in peer_lists(atoms, cutoff, asked):
                tally[peer]["seconds"] += time.perf_counter() - began
                different = np.setxor1d(ours, theirs)
                at_cutoff = np.abs(lengths(different, atoms) - cutoff) < BOUNDARY
                wrong = int((~at_cutoff).sum()) + len(theirs) - len(np.unique(theirs))
                tally[peer]["structures"] += 1
                tally[peer]["edges"] += len(theirs)
                tally[peer]["mismatches"] += wrong
                tally[peer]["boundary"] += int(at_cutoff.sum())
                if wrong:
                    complaints.append(f"structure {index}, cutoff {cutoff}: {wrong} edges differ from {peer}'s")
                began = time.perf_counter()
    for peer in peers:
        tally[peer]["seconds"] = round(tally[peer]["seconds"], 1)
    return tally, complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--nasty", type=int, default=0, metavar="N")
    parser.add_argument("--nearest", nargs="*", type=int, default=[12, 250], metavar="K")
    parser.add_argument("--cutoffs", nargs="+", type=float, default=[5.0, 8.0])
    parser.add_argument("--peers", nargs="+", choices=["matscipy", "ase"], default=["matscipy", "ase"])
    parser.add_argument("--ase-every", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "what": "sets of (target, source, shift), radius_graph against each peer, on every structure of the files",
        "boundary": f"pairs within {BOUNDARY} Å of the cutoff that one list has and the other has not",
        "versions": {name: version(name) for name in ("dpt-hpc", "torch", "numpy", "ase", "matscipy")},
        "python": platform.python_version(),
        "processor_level": _C.level,
        "files": {},
        "mismatches": [],
    }
    if options.out and options.out.exists():
        result |= json.loads(options.out.read_text())
    if options.nasty and NASTY not in result["files"]:
        by_cutoff: dict[float, list[ase.Atoms]] = {}
        for seed in range(options.nasty):
            atoms, cutoff = nasty(seed)
            by_cutoff.setdefault(cutoff, []).append(atoms)
        note(result, NASTY, by_cutoff, options)
    for path in options.files:
        if path.name not in result["files"]:
            note(result, path.name, dict.fromkeys(options.cutoffs, read(path)), options)
    print(json.dumps(result.get("total"), indent=1))
    return 1 if result["mismatches"] else 0


def note(result: dict[str, Any], name: str, sets: dict[float, list[ase.Atoms]], options: argparse.Namespace) -> None:
    """Compare the structures of each cutoff, and write what was found so far."""
    tallies = {}
    for cutoff, structures in sorted(sets.items()):
        tallies[str(cutoff)], found = compare(structures, cutoff, options.peers, options.ase_every, options.nearest)
        result["mismatches"] += [f"{name}, {line}" for line in found]
        print(name, cutoff, tallies[str(cutoff)], flush=True)
    result["files"][name] = tallies
    result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result["total"] = total([t for file in result["files"].values() for t in file.values()])
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def total(tallies: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over files and cutoffs; a structure counts once per cutoff."""
    sums: dict[str, Any] = {key: sum(t[key] for t in tallies) for key in ("structures", "edges")}
    for peer in ("matscipy", "ase"):
        counted = [t[peer] for t in tallies if peer in t]
        sums[peer] = {k: sum(c[k] for c in counted) for k in ("structures", "edges", "mismatches", "boundary")}
    cuts = [cut for tally in tallies for cut in tally["nearest"].values()]
    sums["nearest"] = {k: sum(cut[k] for cut in cuts) for k in ("rows_cut", "mismatches")}
    return sums


if __name__ == "__main__":
    sys.exit(main())

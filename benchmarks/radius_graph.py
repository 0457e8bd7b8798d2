"""Edges per second of radius_graph, pymatgen's find_points_in_spheres and matscipy, on one core.

    python benchmarks/radius_graph.py --small perovskites.json.gz --medium FILE.xyz... [--out FILE.json]

Three sets at 5 and 8 Å: the first 500 structures of the small file; 300 of the medium files' structures of 20 to 100
atoms, drawn with a fixed seed; 8,000 rattled silicon atoms. radius_graph takes a set as one batch, the peers take its
structures one by one, which is what they offer. Times are medians of process CPU time over rounds in which all take
turns, so that a busy machine slows all of them alike. Every list must have the same number of edges. Page faults of
large results cost as much as finding them: run it with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
MALLOC_TOP_PAD_=268435456 to keep freed memory (the result records these settings).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ase
import ase.build
import numpy as np
import torch
from matscipy.neighbours import neighbour_list
from pymatgen.optimization.neighbors import find_points_in_spheres
from radius_graph_equality import read

from dpt_hpc import _C
from dpt_hpc.ops import radius_graph

PERIODIC = np.ones(3, dtype=np.int64)


def sets(small: Path, medium: list[Path]) -> dict[str, list[ase.Atoms]]:
    cells = [atoms for path in medium for atoms in read(path) if 20 <= len(atoms) <= 100]
    drawn = np.random.default_rng(0).choice(len(cells), min(300, len(cells)), replace=False)
    silicon = ase.build.bulk("Si", cubic=True) * (10, 10, 10)
    silicon.rattle(0.05, seed=0)
    return {
        "500 small cells": read(small)[:500],
        f"{len(drawn)} cells of 20-100 atoms": [cells[k] for k in drawn],
        "8,000 atoms": [silicon],
    }


def contenders(structures: list[ase.Atoms], cutoff: float) -> dict[str, Callable[[], int]]:
    """Each returns its number of directed edges."""
    batch = (
        torch.tensor(np.concatenate([s.positions for s in structures])),
        torch.tensor(np.stack([s.cell.array for s in structures])),
        torch.tensor(np.stack([s.pbc for s in structures])),
        torch.tensor(np.cumsum([0] + [len(s) for s in structures])),
    )

    def ours(max_neighbors: int | None = None) -> int:
        return radius_graph(*batch, cutoff, max_neighbors).num_edges

    def pymatgen() -> int:
        edges = 0
        for s in structures:
            x, cell = s.positions, np.ascontiguousarray(s.cell.array)
            # Lists every atom as a neighbour of itself at distance zero.
            found = find_points_in_spheres(x, x, r=cutoff, pbc=PERIODIC, lattice=cell, tol=1e-8)
            edges += len(found[0]) - len(x)
        return edges

    def matscipy() -> int:
        return sum(len(neighbour_list("ijS", s, cutoff)[0]) for s in structures)

    return {
        "radius_graph": ours,
        "radius_graph, nearest 250": lambda: ours(250),
        "pymatgen": pymatgen,
        "matscipy": matscipy,
    }


def measure(structures: list[ase.Atoms], cutoff: float, repeats: int) -> dict[str, Any]:
    runs = contenders(structures, cutoff)
    edges = {name: run() for name, run in runs.items()}  # also warms up
    found = edges["radius_graph"]
    assert found == edges["pymatgen"] == edges["matscipy"], f"different numbers of edges: {edges}"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    # The nearest 250 are chosen from the full list: its edges are the ones found.
    rate = {name: round(found / statistics.median(s) / 1e6, 1) for name, s in seconds.items()}
    fastest = max(rate["pymatgen"], rate["matscipy"])
    return {"edges": found, "million_edges_per_second": rate, "ratio": round(rate["radius_graph"] / fastest, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--medium", type=Path, nargs="+", required=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "what": "directed edges per second of one core, medians of process CPU time; ratio: to the fastest peer",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("dpt-hpc", "torch", "numpy", "pymatgen-core", "matscipy")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor_level": _C.level,
        "repeats": options.repeats,
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "sets": {},
    }
    for name, structures in sets(options.small, options.medium).items():
        result["sets"][name] = {"structures": len(structures), "atoms": sum(len(s) for s in structures)}
        for cutoff in (5.0, 8.0):
            result["sets"][name][f"{cutoff} Å"] = measure(structures, cutoff, options.repeats)
            print(name, cutoff, result["sets"][name][f"{cutoff} Å"], flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

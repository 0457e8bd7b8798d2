"""Neighbour lists of other packages, each called as its documentation says, from the same arrays.

A peer takes (structures, cutoff, threads) once and gives a function that makes the lists and returns the number of
directed edges. Converting the structures into the peer's own types is not timed. Peers that are not installed are named
as left out; `make bench` installs those of the dependency group `peers`.

torch-cluster knows no periodic images: what is timed is our backend `pyg`, which makes them, searches with it,
and checks and sorts what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from dpt_hpc.ops import radius_graph
from dpt_hpc.structure import Structure

Run = Callable[[], int]
Peer = Callable[[list[Structure], float, int], Run]


def arrays(structures: list[Structure]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [(s.positions.numpy(), s.cell.numpy(), s.pbc.numpy()) for s in structures]


def flat(structures: list[Structure], device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """positions, cell, pbc, atom_ptr of the batch."""
    batch = (
        torch.cat([s.positions for s in structures]),
        torch.stack([s.cell for s in structures]),
        torch.stack([s.pbc for s in structures]),
        torch.tensor([0] + [s.num_atoms for s in structures]).cumsum(0),
    )
    return tuple(t.to(device) for t in batch)


def matscipy(structures: list[Structure], cutoff: float, threads: int) -> Run:
    from matscipy.neighbours import neighbour_list

    crystals = arrays(structures)
    return lambda: sum(
        len(neighbour_list("ijS", cutoff=cutoff, positions=x, cell=cell, pbc=pbc)[0]) for x, cell, pbc in crystals
    )


def pymatgen(structures: list[Structure], cutoff: float, threads: int) -> Run:
    from pymatgen.optimization.neighbors import find_points_in_spheres

    crystals = [(x, np.ascontiguousarray(cell), pbc.astype(np.int64)) for x, cell, pbc in arrays(structures)]

    def run() -> int:
        edges = 0
        for x, cell, pbc in crystals:
            # Lists every atom as a neighbour of itself at distance zero.
            edges += len(find_points_in_spheres(x, x, r=cutoff, pbc=pbc, lattice=cell, tol=1e-8)[0]) - len(x)
        return edges

    return run


def vesin(structures: list[Structure], cutoff: float, threads: int) -> Run:
    from vesin import NeighborList

    calculator = NeighborList(cutoff=cutoff, full_list=True, sorted=False, n_threads=threads)
    crystals = arrays(structures)
    return lambda: sum(
        len(calculator.compute(x, cell, pbc, quantities="ijS", copy=False)[0]) for x, cell, pbc in crystals
    )


def nvalchemi(method: str) -> Peer:
    def prepare(structures: list[Structure], cutoff: float, threads: int) -> Run:
        from nvalchemiops.torch.neighbors import neighbor_list

        batch = flat(structures)
        most = int(radius_graph(*batch, cutoff).target_ptr.diff().max())  # its buffers, sized exactly
        positions, cell, pbc, atom_ptr = batch

        def run() -> int:
            edges, _, _ = neighbor_list(
                positions,
                cutoff,
                cell,
                pbc,
                batch_ptr=atom_ptr.int(),
                method=method,
                max_neighbors=most,
                return_neighbor_list=True,
            )
            return int(edges.shape[1])

        return run

    return prepare


def torch_cluster(structures: list[Structure], cutoff: float, threads: int) -> Run:
    batch = flat(structures)
    return lambda: radius_graph(*batch, cutoff, backend="pyg").num_edges


PEERS: dict[str, tuple[str, Peer]] = {
    "pymatgen": ("pymatgen", pymatgen),
    "matscipy": ("matscipy", matscipy),
    "vesin": ("vesin", vesin),
    "nvalchemi, naive": ("nvalchemiops", nvalchemi("batch_naive")),
    "nvalchemi, cell list": ("nvalchemiops", nvalchemi("batch_cell_list")),
    "our backend pyg (torch-cluster)": ("torch_cluster", torch_cluster),
}
"""Name, the module that must be there, and how it is called."""


def installed() -> dict[str, Peer]:
    return {name: peer for name, (module, peer) in PEERS.items() if find_spec(module)}


def left_out() -> dict[str, str]:
    """The others, and why."""
    return {name: f"{module} is not installed" for name, (module, _) in PEERS.items() if not find_spec(module)}

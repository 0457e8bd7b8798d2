"""The backend "pyg": the plain twins on the kernels of torch-scatter and torch-cluster, which the extra `pyg` installs.

Of torch-scatter, `scatter` alone: its segment_csr and gather_csr have wrong second derivatives (rusty1s/
pytorch_scatter#299), which a loss on forces needs.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dpt_hpc import _C
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.ops import reference
from dpt_hpc.ops.radius_fault import fault_error
from dpt_hpc.ops.radius_graph import RadiusGraph
from dpt_hpc.structure import CLOSEST_ATOMS

MARGIN = 1e-6
"""Å, and fractions of a cell: torch-cluster searches this much farther than the cutoff, and this module compares."""
MOST_IMAGES = 1 << 26


def cgconv(*inputs: Any) -> Tensor:
    """As `dpt_hpc.ops.cgconv`, summed by torch-scatter; differentiable any number of times."""
    return reference.cgconv(*inputs, sum_rows=_sum_rows)


def radial_messages(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """As `dpt_hpc.ops.radial_messages`, summed by torch-scatter; differentiable any number of times."""
    return reference.radial_messages(*inputs, **options, sum_rows=_sum_rows)


def gather_aggregate(weights: Tensor, features: Tensor, graph: RadiusGraph) -> Tensor:
    """As `dpt_hpc.ops.gather_aggregate`, summed by torch-scatter; differentiable any number of times."""
    return reference.gather_aggregate(weights, features, graph, sum_rows=_sum_rows)


edge_product = reference.edge_product


def radius_graph(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    atom_ptr: Tensor,
    cutoff: float,
    max_neighbors: int | None = None,
    max_images: int | None = None,
) -> RadiusGraph:
    """As `dpt_hpc.ops.radius_graph`: torch-cluster searches among explicit periodic images, in float64.

    torch-cluster gives the neighbours in no promised order and cannot choose the nearest; sorting and choosing are done
    here. Distances are rounded as PyTorch rounds them: where two neighbours are equally far, or one lies on the cutoff,
    the last bit may decide otherwise than in the native kernel.
    """
    points, lattice = positions.detach().double(), cell.detach().double() * pbc[:, :, None]
    counts = atom_ptr.diff()
    structure = torch.repeat_interleave(torch.arange(len(counts), device=points.device), counts)
    _refuse_broken(points, cell, lattice, pbc, atom_ptr, structure, cutoff)
    home, atom, image = _images(points, lattice, pbc, structure, cutoff, atom_ptr)
    of_atom = lattice[structure]
    wrapped = points - _rowwise(home, of_atom)
    target, found = _module("torch_cluster").radius(
        wrapped[atom] + _rowwise(image, of_atom[atom]),
        wrapped,
        cutoff + MARGIN,
        structure[atom],
        structure,
        max_num_neighbors=max(1, len(atom)),
        batch_size=max(1, len(counts)),
    )
    # Images are numbered by atom, then shift: this is the order of the edges.
    order = torch.argsort(target * len(atom) + found)
    target, found = target[order], found[order]
    source = atom[found]
    shift = image[found] - home[source] + home[target]
    squares = (points[source] - points[target] + _rowwise(shift, of_atom[target])).square().sum(1)
    near = (squares <= cutoff * cutoff) & ((source != target) | shift.ne(0).any(1))
    _refuse_coincident(source[near], target[near], squares[near], structure, cell, atom_ptr, cutoff)
    if max_images is not None:
        near &= shift.abs().amax(1) <= max_images
    return reference.graph_of(
        source[near], target[near], shift[near].to(torch.int32), squares[near], len(points), max_neighbors
    )


def _images(
    points: Tensor, lattice: Tensor, pbc: Tensor, structure: Tensor, cutoff: float, atom_ptr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """home (N,3): the image whose cell each atom is in · of every image that can lie within the cutoff of any atom
    wrapped into the cell: its atom (P,), and the lattice vectors (P,3) that the wrapped atom is moved by."""
    dual = torch.linalg.pinv(lattice)  # columns are zero for open axes, and 1 / height long for the others
    fractions = _rowwise(points, dual[structure])
    home = fractions.floor()
    periodic = pbc[structure]
    reach = (cutoff + MARGIN) * dual.norm(dim=1)[structure] + MARGIN
    low = torch.where(periodic, (home - fractions - reach).ceil(), 0)
    high = torch.where(periodic, (home - fractions + 1 + reach).floor(), 0)
    per_axis = high - low + 1
    per_atom = per_axis.prod(1)
    per_structure = per_atom.new_zeros(len(lattice)).index_add(0, structure, per_atom)
    for index in (per_structure > MOST_IMAGES).nonzero().flatten().tolist()[:1]:
        raise fault_error(_fault("IMAGES", index, value=float(per_structure[index])), atom_ptr, lattice, cutoff)
    sizes, per_atom = per_axis.long(), per_atom.long()
    atom = torch.repeat_interleave(torch.arange(len(points), device=points.device), per_atom)
    place = torch.arange(len(atom), device=points.device) - (per_atom.cumsum(0) - per_atom)[atom]
    sizes = sizes[atom]
    steps = [place // (sizes[:, 1] * sizes[:, 2]), place // sizes[:, 2] % sizes[:, 1], place % sizes[:, 2]]
    return home, atom, torch.stack(steps, 1) + low[atom]


def _refuse_broken(
    points: Tensor, cell: Tensor, lattice: Tensor, pbc: Tensor, atom_ptr: Tensor, structure: Tensor, cutoff: float
) -> None:
    for row, column in (~(points.abs() <= 1e15)).nonzero().tolist()[:1]:
        fault = _fault("POSITIONS", int(structure[row]), row, value=float(points[row, column]))
        raise fault_error(fault, atom_ptr, cell, cutoff)
    flat = torch.linalg.matrix_rank(lattice, rtol=1e-9) < pbc.sum(1) if len(lattice) else pbc[:, 0]
    for index in (flat & (atom_ptr.diff() > 0)).nonzero().flatten().tolist()[:1]:
        raise fault_error(_fault("CELL", index), atom_ptr, cell, cutoff)


def _refuse_coincident(
    source: Tensor, target: Tensor, squares: Tensor, structure: Tensor, cell: Tensor, atom_ptr: Tensor, cutoff: float
) -> None:
    for edge in (squares < CLOSEST_ATOMS**2).nonzero().flatten().tolist()[:1]:
        i, j = int(target[edge]), int(source[edge])
        fault = _fault("COINCIDENT", int(structure[i]), i, j, float(squares[edge].sqrt()))
        raise fault_error(fault, atom_ptr, cell, cutoff)


def _fault(kind: str, structure: int, target: int = -1, source: int = -1, value: float = 0.0) -> SimpleNamespace:
    kinds = _C.RadiusFault.Kind
    return SimpleNamespace(kind=getattr(kinds, kind), structure=structure, target=target, source=source, value=value)


def _rowwise(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows[n] @ matrices[n]: (n,3), (n,3,3) -> (n,3)."""
    return (rows[:, :, None] * matrices).sum(1)


def _sum_rows(index: Tensor, rows: Tensor, count: int) -> Tensor:
    total: Tensor = _module("torch_scatter").scatter(rows, index, dim=0, dim_size=count, reduce="sum")
    return total


def _module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: PyTorch cannot load its library
        package = name.replace("_", "-")
        built = "" if isinstance(error, ModuleNotFoundError) else " It is there, but was built for another torch."
        raise EnvironmentFault(
            f"The backend 'pyg' needs {package}, which Python cannot import ({error}).{built}\n"
            "Install the extra beside the torch that is here: pip install --no-build-isolation 'dpt-hpc[pyg]'\n"
            "(it compiles for a quarter of an hour), or use the backend 'native', which is faster, or 'reference'."
        ) from error

"""The periodic radius graph: checks, allocation and the call of the native kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_hpc import _C
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.network_options import Backend
from dpt_hpc.ops.backends import plain_twins
from dpt_hpc.ops.kept import kept
from dpt_hpc.ops.radius_fault import check_cells, check_offsets, fault_error
from dpt_hpc.ops.radius_graph_cuda import edges_by_source, find_edges


@dataclass(frozen=True)
class RadiusGraph:
    """The directed edges j -> i of a batch: |positions[j] + cell_shifts @ cell - positions[i]| <= cutoff.

    edge_index (2,E) int64: row 0 = source j, row 1 = target i, sorted by (target, source, shift) · cell_shifts (E,3)
    int32 · target_ptr (N+1,) int64: the edges into atom i are target_ptr[i] .. target_ptr[i+1] · num_truncated: how
    many atoms had more neighbours than max_neighbors kept.
    """

    edge_index: Tensor
    cell_shifts: Tensor
    target_ptr: Tensor
    num_truncated: int = 0

    @property
    def num_edges(self) -> int:
        return int(self.edge_index.shape[1])

    @property
    def num_atoms(self) -> int:
        return int(self.target_ptr.shape[0]) - 1

    @property
    def by_source(self) -> tuple[Tensor, Tensor]:
        """(order (E,) int64, ptr (N+1,) int64): order[ptr[j]:ptr[j+1]] are the edges out of atom j, ascending."""
        return kept(self, "by_source", self.edge_index, self._by_source)

    def _by_source(self) -> tuple[Tensor, Tensor]:
        if self.edge_index.is_cuda and _C.has_cuda:
            with torch.cuda.device(self.edge_index.device):
                return edges_by_source(_C.CudaRadiusGraph, self.edge_index[0], self.num_atoms)
        if self.edge_index.is_cuda:
            sources, order = torch.sort(self.edge_index[0], stable=True)
            return order, torch.searchsorted(sources, torch.arange(self.num_atoms + 1, device=sources.device))
        order = torch.empty(self.num_edges, dtype=torch.int64)
        ptr = torch.empty(self.num_atoms + 1, dtype=torch.int64)
        sources = self.edge_index[0].contiguous()
        _C.edges_by_source(sources.data_ptr(), self.num_edges, self.num_atoms, ptr.data_ptr(), order.data_ptr())
        return order, ptr


def radius_graph(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    atom_ptr: Tensor,
    cutoff: float,
    max_neighbors: int | None = None,
    max_images: int | None = None,
    backend: Backend = "native",
) -> RadiusGraph:
    """Every pair of atoms within the cutoff, through every periodic image, exactly.

    positions (N,3) Å · cell (B,3,3) Å, rows are lattice vectors · pbc (B,3) bool · atom_ptr (B+1,) int64, the
    structures' atoms. Any cell and any positions: thinner than the cutoff, sheared, left-handed, atoms outside the
    cell; the vectors of axes that are not periodic are ignored. An atom is a neighbour of its own images.

    max_neighbors keeps the nearest so many of each atom, ties by (distance, source, shift); max_images keeps only
    |shift| <= max_images on every axis, which loses edges and exists to reproduce published graphs. Distances are
    compared in float64 whatever the dtype of the positions. The result is the same for any number of threads
    (torch.get_num_threads() are used).

    Errors: TypeError and ValueError for arguments of a wrong kind; DataError for a structure that is broken: positions
    or a cell that are not finite, periodic vectors that span nothing, images without end, two atoms in one place.
    """
    _check_arguments(positions, cell, pbc, atom_ptr, cutoff, max_neighbors, max_images)
    num_atoms, threads = positions.shape[0], torch.get_num_threads()
    points = positions.detach().to(torch.float64).contiguous()
    cells = cell.detach().to(torch.float64).contiguous()
    periodic, offsets = pbc.contiguous(), atom_ptr.contiguous()
    if backend != "native":
        check_offsets(offsets, num_atoms)
        check_cells(cells)
        graph: RadiusGraph = plain_twins(backend, "radius_graph").radius_graph(
            points, cells, periodic, offsets, cutoff, max_neighbors, max_images
        )
        return graph
    if positions.is_cuda and _C.has_cuda:
        with torch.cuda.device(positions.device):
            kernels = _C.CudaRadiusGraph
            return RadiusGraph(
                *find_edges(kernels, points, cells, periodic, offsets, cutoff, max_neighbors, max_images)
            )
    if positions.device.type != "cpu":
        raise EnvironmentFault(
            f"radius_graph: positions are on {positions.device}, but this build of dpt_hpc has no kernels for it.\n"
            "Install it where nvcc is found (or with -C cmake.define.DPT_HPC_CUDA=ON), or move the batch to the CPU."
        )
    check_offsets(offsets, num_atoms)
    check_cells(cells)
    target_ptr = torch.empty(num_atoms + 1, dtype=torch.int64)
    search = _C.radius_search(
        points.data_ptr(),
        cells.data_ptr(),
        periodic.data_ptr(),
        offsets.data_ptr(),
        cell.shape[0],
        float(cutoff),
        max_neighbors or 0,
        -1 if max_images is None else max_images,
        threads,
        target_ptr.data_ptr(),
    )
    if search.fault.kind != _C.RadiusFault.Kind.NONE:
        raise fault_error(search.fault, offsets, cells, cutoff)
    edge_index = torch.empty((2, search.num_edges), dtype=torch.int64)
    cell_shifts = torch.empty((search.num_edges, 3), dtype=torch.int32)
    _C.radius_fill(search, target_ptr.data_ptr(), threads, edge_index.data_ptr(), cell_shifts.data_ptr())
    return RadiusGraph(edge_index, cell_shifts, target_ptr, search.num_truncated)


def _check_arguments(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    atom_ptr: Tensor,
    cutoff: float,
    max_neighbors: int | None,
    max_images: int | None,
) -> None:
    num_structures = cell.shape[0] if cell.ndim else 0
    floats = (torch.float32, torch.float64)
    for name, value, shape, dtypes in (
        ("positions", positions, "(N, 3)", floats),
        ("cell", cell, "(B, 3, 3)", floats),
        ("pbc", pbc, f"({num_structures}, 3)", (torch.bool,)),
        ("atom_ptr", atom_ptr, f"({num_structures + 1},)", (torch.int64,)),
    ):
        if value.dtype not in dtypes:
            raise TypeError(f"radius_graph: {name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}.")
        right = {
            "positions": value.ndim == 2 and value.shape[1] == 3,
            "cell": value.ndim == 3 and tuple(value.shape[1:]) == (3, 3),
            "pbc": tuple(value.shape) == (num_structures, 3),
            "atom_ptr": tuple(value.shape) == (num_structures + 1,),
        }
        if not right[name]:
            raise ValueError(f"radius_graph: {name}: expected shape {shape}, got {tuple(value.shape)}.")
        if value.device != positions.device:
            raise ValueError(
                f"radius_graph: {name}: expected the device of positions, {positions.device}, got {value.device}."
            )
    if not (math.isfinite(cutoff) and cutoff >= 0):
        raise ValueError(f"radius_graph: cutoff: expected a finite length >= 0 Å, got {cutoff}.")
    for name, limit, least in (("max_neighbors", max_neighbors, 1), ("max_images", max_images, 0)):
        if limit is not None and limit < least:
            raise ValueError(f"radius_graph: {name}: expected None or an integer >= {least}, got {limit}.")

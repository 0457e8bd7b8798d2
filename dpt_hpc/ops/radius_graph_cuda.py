"""The radius graph on a GPU: allocation, the scan between counting and filling, and the one synchronisation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from dpt_hpc import _C
from dpt_hpc.ops import radius_fault
from dpt_hpc.ops.radius_fault import check_cells, check_offsets, fault_error

EVERYTHING = 2**31 - 1
CELL_LIST_ATOMS = 8192
"""Structures of so many atoms are searched through bins: where testing all pairs twice costs more than sorting."""


class Edges(NamedTuple):
    """The fields of a RadiusGraph."""

    edge_index: Tensor
    cell_shifts: Tensor
    target_ptr: Tensor
    num_truncated: int


def find_edges(
    kernels: type[_C.CudaRadiusGraph],
    positions: Tensor,
    cells: Tensor,
    pbc: Tensor,
    atom_ptr: Tensor,
    cutoff: float,
    max_neighbors: int | None,
    max_images: int | None,
    cell_list_atoms: int | None = None,
) -> Edges:
    """Count, scan, fill. Arguments are contiguous, positions and cells in float64, all on one device.

    The stream is waited for once, for the sizes of the result; faults come with them.
    cell_list_atoms: another number than CELL_LIST_ATOMS.
    """
    device, num_atoms, num_structures = positions.device, positions.shape[0], cells.shape[0]
    cell_list_atoms = CELL_LIST_ATOMS if cell_list_atoms is None else cell_list_atoms
    if num_structures == 0:
        check_offsets(atom_ptr, num_atoms)
    stream = _stream(device)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    fractions = empty(num_atoms, 3, dtype=torch.float64)
    records = empty(num_structures, kernels.record_bytes(), dtype=torch.uint8)
    masks = empty(num_atoms, kernels.mask_words())
    faults = empty(num_structures, dtype=torch.int32)
    counts, coincident = empty(num_atoms), empty(num_atoms)
    tallies = torch.zeros((5, num_atoms + 1), dtype=torch.int64, device=device)
    binned = num_atoms >= cell_list_atoms
    bins, bin_order, bin_ptr = (empty(num_atoms + 1 if binned else 0) for _ in range(3))
    graph = kernels(
        positions=positions.data_ptr(),
        cells=cells.data_ptr(),
        pbc=pbc.data_ptr(),
        atom_ptr=atom_ptr.data_ptr(),
        num_structures=num_structures,
        num_atoms=num_atoms,
        cutoff=cutoff,
        max_images=EVERYTHING if max_images is None else min(max_images, EVERYTHING),
        max_neighbors=2**62 if max_neighbors is None else max_neighbors,
        cell_list_atoms=cell_list_atoms,
        fractions=fractions.data_ptr(),
        records=records.data_ptr(),
        masks=masks.data_ptr(),
        bins=bins.data_ptr(),
        bin_order=bin_order.data_ptr(),
        bin_ptr=bin_ptr.data_ptr(),
        faults=faults.data_ptr(),
        coincident=coincident.data_ptr(),
        counts=counts.data_ptr(),
        tallies=tallies.data_ptr(),
    )
    graph.prepare(stream=stream)
    if binned:
        _sort_bins(bins[:num_atoms], bin_order[:num_atoms], bin_ptr)
    graph.count(stream=stream)
    scan = tallies.cumsum(1)
    num_edges, num_truncated, num_distances, num_listed, faulty = scan[:, -1].tolist()
    if faulty:
        check_offsets(atom_ptr, num_atoms)
        check_cells(cells)
        raise _first_fault(positions, cells, pbc, atom_ptr, cutoff, faults, coincident)
    if num_edges > radius_fault.MOST_EDGES:
        raise fault_error(_fault("EDGES", -1, value=num_edges), atom_ptr, cells, cutoff)
    hits = empty(num_listed, 4, dtype=torch.int32)
    if num_listed:
        graph.list(scan=scan.data_ptr(), hits=hits.data_ptr(), stream=stream)
    last_key, ties = (empty(num_atoms if num_truncated else 0) for _ in range(2))
    if num_truncated:
        distances = empty(num_distances, dtype=torch.float64)
        graph.select(
            scan=scan.data_ptr(),
            hits=hits.data_ptr(),
            distances=distances.data_ptr(),
            last_key=last_key.data_ptr(),
            ties=ties.data_ptr(),
            stream=stream,
        )
    edge_index, cell_shifts = empty(2, num_edges), empty(num_edges, 3, dtype=torch.int32)
    graph.fill(
        scan=scan.data_ptr(),
        hits=hits.data_ptr(),
        last_key=last_key.data_ptr(),
        ties=ties.data_ptr(),
        num_edges=num_edges,
        edge_index=edge_index.data_ptr(),
        cell_shifts=cell_shifts.data_ptr(),
        stream=stream,
    )
    return Edges(edge_index, cell_shifts, scan[0].clone(), num_truncated)


def edges_by_source(kernels: type[_C.CudaRadiusGraph], sources: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """(order (E,), ptr (N+1,)) for sources (E,) int64 on a GPU, as RadiusGraph.by_source; waits for nothing."""
    stream, num_edges = _stream(sources.device), sources.shape[0]
    sources = sources.contiguous()
    counts, taken = sources.new_zeros(num_atoms + 1), sources.new_zeros(num_atoms)
    kernels.count_sources(sources=sources.data_ptr(), num_edges=num_edges, counts=counts.data_ptr(), stream=stream)
    ptr, order = counts.cumsum(0), torch.empty_like(sources)
    kernels.order_by_source(
        sources=sources.data_ptr(),
        num_edges=num_edges,
        num_atoms=num_atoms,
        ptr=ptr.data_ptr(),
        next=taken.data_ptr(),
        order=order.data_ptr(),
        stream=stream,
    )
    return order, ptr


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _sort_bins(bins: Tensor, order: Tensor, ptr: Tensor) -> None:
    """order: the atoms by bin, stably · ptr: where each bin starts in it."""
    ordered, indices = bins.sort(stable=True)
    order.copy_(indices)
    torch.searchsorted(ordered, torch.arange(ptr.shape[0], device=ptr.device), out=ptr)


def _fault(kind: str, structure: int, target: int = -1, source: int = -1, value: float = 0.0) -> SimpleNamespace:
    kinds = _C.RadiusFault.Kind
    return SimpleNamespace(kind=getattr(kinds, kind), structure=structure, target=target, source=source, value=value)


def _first_fault(
    positions: Tensor,
    cells: Tensor,
    pbc: Tensor,
    atom_ptr: Tensor,
    cutoff: float,
    faults: Tensor,
    coincident: Tensor,
) -> Exception:
    """The fault of the first structure that has one, with the details that the kernels do not write down."""
    batch = (positions, cells, pbc, atom_ptr, faults, coincident)
    positions, cells, pbc, atom_ptr, faults, coincident = (t.cpu() for t in batch)
    targets = (coincident >= 0).nonzero()[:, 0]
    broken = faults.nonzero()[:, 0].tolist()
    structures = torch.bucketize(targets, atom_ptr[1:], right=True).tolist()
    structure = min(broken + structures)
    own = slice(int(atom_ptr[structure]), int(atom_ptr[structure + 1]))
    if structure not in broken:
        target = int(targets[structures.index(structure)])
        source = int(coincident[target])
        difference = positions[source] - positions[target]
        lattice = cells[structure] * pbc[structure][:, None]
        length = float((difference - (difference @ torch.linalg.pinv(lattice)).round() @ lattice).norm())
        fault = _fault("COINCIDENT", structure, target, source, length)
    else:
        kind = _C.RadiusFault.Kind(int(faults[structure])).name
        fault = _fault(kind, structure)
        if kind == "POSITIONS":
            wrong = ~(positions[own].abs() <= 1e15)
            row, column = wrong.nonzero()[0].tolist()
            fault = _fault(kind, structure, own.start + row, value=float(positions[own][row, column]))
        elif kind == "IMAGES":
            fault = _fault(kind, structure, value=float("inf"))
    return fault_error(fault, atom_ptr, cells, cutoff)

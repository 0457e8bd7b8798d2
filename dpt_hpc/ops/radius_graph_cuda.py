"""The radius graph on a GPU: allocation, the scan between counting and filling, and the one synchronisation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from dpt_hpc import _C
from dpt_hpc.ops.radius_fault import fault_error

MOST_EDGES = 2**31 - 1
EVERYTHING = 2**31 - 1


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
) -> Edges:
    """Count, scan, fill. Arguments are contiguous, positions and cells in float64, all on one device."""
    device, num_atoms, num_structures = positions.device, positions.shape[0], cells.shape[0]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    fractions = empty(num_atoms, 3, dtype=torch.float64)
    records = empty(num_structures, kernels.record_bytes(), dtype=torch.uint8)
    faults = empty(num_structures, dtype=torch.int32)
    counts, coincident = empty(num_atoms), empty(num_atoms)
    graph = kernels(
        positions=positions.data_ptr(),
        cells=cells.data_ptr(),
        pbc=pbc.data_ptr(),
        atom_ptr=atom_ptr.data_ptr(),
        num_structures=num_structures,
        num_atoms=num_atoms,
        cutoff=cutoff,
        max_images=EVERYTHING if max_images is None else min(max_images, EVERYTHING),
        fractions=fractions.data_ptr(),
        records=records.data_ptr(),
        faults=faults.data_ptr(),
    )
    graph.count(counts=counts.data_ptr(), coincident=coincident.data_ptr(), stream=stream)
    most = EVERYTHING if max_neighbors is None else max_neighbors
    cut = counts > most
    target_ptr = torch.zeros(num_atoms + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts.clamp(max=most), 0, out=target_ptr[1:])
    summary = [target_ptr[-1], cut.sum(), (counts * cut).sum(), faults.any().long() + (coincident >= 0).any()]
    num_edges, num_truncated, num_distances, faulty = torch.stack(summary).tolist()
    if faulty:
        raise _first_fault(positions, cells, pbc, atom_ptr, cutoff, faults, coincident)
    if num_edges > MOST_EDGES:
        raise fault_error(_fault("EDGES", -1, value=num_edges), atom_ptr, cells, cutoff)
    last_key = ties = None
    if num_truncated:
        lengths = counts * cut
        offsets = lengths.cumsum(0) - lengths
        distances = empty(num_distances, dtype=torch.float64)
        last_key, ties = empty(num_atoms), empty(num_atoms)
        graph.select(
            counts=counts.data_ptr(),
            max_neighbors=most,
            offsets=offsets.data_ptr(),
            distances=distances.data_ptr(),
            last_key=last_key.data_ptr(),
            ties=ties.data_ptr(),
            stream=stream,
        )
    edge_index, cell_shifts = empty(2, num_edges), empty(num_edges, 3, dtype=torch.int32)
    graph.fill(
        counts=counts.data_ptr(),
        max_neighbors=most,
        last_key=0 if last_key is None else last_key.data_ptr(),
        ties=0 if ties is None else ties.data_ptr(),
        target_ptr=target_ptr.data_ptr(),
        num_edges=num_edges,
        edge_index=edge_index.data_ptr(),
        cell_shifts=cell_shifts.data_ptr(),
        stream=stream,
    )
    return Edges(edge_index, cell_shifts, target_ptr, num_truncated)


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

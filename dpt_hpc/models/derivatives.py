"""Forces and stress as exact derivatives of any energy model: one strain, one gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_hpc.errors import DataError
from dpt_hpc.models.energy_model import EnergyModel
from dpt_hpc.ops import RadiusGraph, inner_derivative, radius_graph
from dpt_hpc.stopwatch import part
from dpt_hpc.structure import Batch


@dataclass(frozen=True)
class Prediction:
    """energy (B,) eV · forces (N,3) eV/Å or None · stress (B,3,3) eV/Å³, tension positive, or None."""

    energy: Tensor
    forces: Tensor | None = None
    stress: Tensor | None = None


def build_graph(model: EnergyModel, batch: Batch) -> RadiusGraph:
    """The graph that `model` reads. Integers only, so no gradient passes through its construction."""
    return radius_graph(
        batch.positions.detach(),
        batch.cell,
        batch.pbc,
        batch.atom_ptr,
        cutoff=model.cutoff,
        max_neighbors=model.max_neighbors,
        max_images=model.max_images,
    )


def predict(
    model: EnergyModel,
    batch: Batch,
    *,
    forces: bool = True,
    stress: bool | Tensor = True,
    graph: RadiusGraph | None = None,
) -> Prediction:
    """Energy, and its derivatives on request (method.md, "Derivatives").

    A symmetric strain of value zero acts on positions and cell, so that one call of autograd gives both
    forces = -dE/dpositions and stress = (1/V) dE/dstrain. In training mode the result can be differentiated once more
    with respect to the weights; in eval mode it is detached. stress: of all structures, of none, or of those of a mask
    (B,) bool; it is 0 for the others, which need no volume. graph: `build_graph` of the batch, if it is there already.

    Raises DataError if stress is asked for a structure without a volume.
    """
    asked = stress if isinstance(stress, Tensor) else None
    stress = asked is not None or bool(stress)
    if graph is None:
        with part("graph"):
            graph = build_graph(model, batch)
    if not (forces or stress):
        vectors = edge_vectors(batch.positions, batch.cell, graph, batch.batch)
        return Prediction(model(batch.atomic_numbers, vectors, graph, batch.atom_ptr))

    create_graph = model.training and torch.is_grad_enabled()
    # Nobody outside can reach these positions and this strain: the loss is differentiated in the weights alone.
    with torch.enable_grad(), inner_derivative():
        positions, cell = batch.positions, batch.cell
        strain = torch.zeros_like(cell)
        wanted = []
        if forces:
            positions = positions.detach().requires_grad_()
            wanted.append(positions)
        moved = positions
        if stress:
            strain.requires_grad_()
            wanted.append(strain)
            symmetric = 0.5 * (strain + strain.transpose(1, 2))
            moved = positions + _rowwise(positions, symmetric, batch.batch)
            cell = cell + cell @ symmetric
        vectors = edge_vectors(moved, cell, graph, batch.batch)
        energy = model(batch.atomic_numbers, vectors, graph, batch.atom_ptr)
        # Without an edge in the whole batch the energy does not depend on the geometry: gradients are zero.
        gradients = torch.autograd.grad(energy.sum(), wanted, create_graph=create_graph, materialize_grads=True)

    if not create_graph:
        energy = energy.detach()
    return Prediction(
        energy,
        forces=-gradients[0] if forces else None,
        stress=_per_volume(gradients[-1], batch, asked) if stress else None,
    )


def edge_vectors(positions: Tensor, cell: Tensor, graph: RadiusGraph, batch: Tensor) -> Tensor:
    """(E,3) Å: positions[j] + cell_shifts @ cell - positions[i]."""
    source, target = graph.edge_index
    # index_select, not [...]: its backward is index_add, which is deterministic on the CPU; index_put is not.
    structure = batch.index_select(0, target)
    shift = _rowwise(graph.cell_shifts.to(positions.dtype), cell, structure)
    return positions.index_select(0, source) - positions.index_select(0, target) + shift


def _rowwise(rows: Tensor, matrices: Tensor, index: Tensor) -> Tensor:
    """rows[n] @ matrices[index[n]] for every n: (n,3), (B,3,3), (n,) -> (n,3)."""
    return (rows[:, :, None] * matrices.index_select(0, index)).sum(1)


def _per_volume(gradient: Tensor, batch: Batch, asked: Tensor | None) -> Tensor:
    """(B,3,3) eV/Å³: dE/dstrain over the volume, 0 where it is not `asked` for (None: for all)."""
    volume = batch.volume
    flat = volume == 0 if asked is None else (volume == 0) & asked
    if (found := flat.nonzero().flatten()).numel():
        index = int(found[0])
        raise DataError(
            f"predict: stress of structure {index} of the batch: the cell has zero volume, and stress is per volume.\n"
            "Ask for forces only, or give the structure a cell.",
            index,
        )
    if asked is None:
        return gradient / volume[:, None, None]
    return (gradient / torch.where(asked, volume, 1.0)[:, None, None]) * asked[:, None, None]

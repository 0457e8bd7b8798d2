"""What a network must offer so that derivatives, objectives and the trainer can use it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from dpt_hpc.ops import RadiusGraph


class EnergyModel(nn.Module, ABC):
    """A network that maps a periodic graph to one number per structure.

    cutoff: Å, of the graph that the network reads. max_neighbors: how many nearest neighbours that graph keeps (None:
    all). max_images: how many periodic images per axis it sees (None: all, exact).
    """

    cutoff: float
    max_neighbors: int | None
    max_images: int | None

    @abstractmethod
    def forward(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph, atom_ptr: Tensor) -> Tensor:
        """Energies (B,) in eV, or whatever the network was trained on.

        atomic_numbers (N,) int64 · edge_vectors (E,3) Å, of `graph.edge_index` · atom_ptr (B+1,) int64.
        """

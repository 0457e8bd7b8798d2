"""What a network must offer so that derivatives, heads, objectives and the trainer can use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from dpt_hpc.ops import RadiusGraph


@dataclass(frozen=True)
class NodeFeatures:
    """What a network knows of each atom: what its read-out and any head begin from.

    scalars (N,F), which no rotation changes · vectors (N,3,F'), which turn with the structure, on the axes of
    `positions`; None for a network without vectors.
    """

    scalars: Tensor
    vectors: Tensor | None = None


class EnergyModel(nn.Module, ABC):
    """A network that maps a periodic graph to features of the atoms, and these to one number per structure.

    cutoff: Å, of the graph that the network reads. max_neighbors: how many nearest neighbours that graph keeps (None:
    all). max_images: how many periodic images per axis it sees (None: all, exact). num_scalars, num_vectors: F and F'
    of its features (num_vectors 0: no vectors).
    """

    cutoff: float
    max_neighbors: int | None
    max_images: int | None
    num_scalars: int
    num_vectors: int

    @abstractmethod
    def node_features(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        """Features of every atom. atomic_numbers (N,) int64 · edge_vectors (E,3) Å, of `graph.edge_index`."""

    @abstractmethod
    def read_out(self, features: NodeFeatures, atom_ptr: Tensor) -> Tensor:
        """Energies (B,) from the features of the atoms. atom_ptr (B+1,) int64."""

    def features_for_energy(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        """`node_features`, less what `read_out` does not look at; a network may leave that out to save its cost."""
        return self.node_features(atomic_numbers, edge_vectors, graph)

    def forward(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph, atom_ptr: Tensor) -> Tensor:
        """Energies (B,) in eV, or whatever the network was trained on.

        atomic_numbers (N,) int64 · edge_vectors (E,3) Å, of `graph.edge_index` · atom_ptr (B+1,) int64.
        """
        return self.read_out(self.features_for_energy(atomic_numbers, edge_vectors, graph), atom_ptr)

"""Affine output scaling: what a network is asked to learn, against what it is asked to predict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.ops import RadiusGraph
from dpt_hpc.structure import MAX_ATOMIC_NUMBER


class Scaling(EnergyModel):
    """E = scale * network + shift + sum over atoms of element_references[Z].

    The identity unless `set` was called: that is the paper's setting. References and shift do not depend on the
    geometry, so forces and stress are those of `scale * network`. Features and `read_out` are the network's own, as
    they come: only `forward` scales. noise_head: reads the features beside the energy (models/heads.py); None: no head.
    """

    scale: Tensor
    shift: Tensor
    element_references: Tensor

    noise_head: nn.Module | None

    def __init__(self, network: EnergyModel, noise_head: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.noise_head = noise_head
        self.cutoff = network.cutoff
        self.max_neighbors = network.max_neighbors
        self.max_images = network.max_images
        self.num_scalars, self.num_vectors = network.num_scalars, network.num_vectors
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("element_references", torch.zeros(MAX_ATOMIC_NUMBER + 1))

    def set(self, *, scale: float = 1.0, shift: float = 0.0, element_references: Tensor | None = None) -> None:
        """scale, shift: in the label's unit · element_references (119,): eV per atom, by atomic number."""
        self.scale.fill_(scale)
        self.shift.fill_(shift)
        if element_references is not None:
            self.element_references.copy_(element_references)

    def node_features(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        return self.network.node_features(atomic_numbers, edge_vectors, graph)

    def read_out(self, features: NodeFeatures, atom_ptr: Tensor) -> Tensor:
        return self.network.read_out(features, atom_ptr)

    def forward(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph, atom_ptr: Tensor) -> Tensor:
        raw = self.network(atomic_numbers, edge_vectors, graph, atom_ptr)
        per_atom = self.element_references.to(raw.dtype).index_select(0, atomic_numbers)
        structure = torch.repeat_interleave(
            torch.arange(len(raw), device=raw.device), atom_ptr.diff(), output_size=len(atomic_numbers)
        )
        offset = torch.zeros_like(raw).index_add(0, structure, per_atom)
        return self.scale * raw + self.shift + offset

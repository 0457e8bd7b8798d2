"""Heads that predict a vector of every atom without a derivative: what denoising by a head trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpt_hpc.models.derivatives import build_graph, edge_vectors
from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.models.precision import Linear
from dpt_hpc.models.scaling import Scaling
from dpt_hpc.ops import RadiusGraph
from dpt_hpc.stopwatch import part
from dpt_hpc.structure import Batch


class GatedEquivariant(nn.Module):
    """Scalars and vectors of other widths, neither losing its symmetry (Schütt, Unke & Gastegger 2021, figure 3).

    Scalars learn of the vectors by their norms, vectors of the scalars by a gate per channel. scalars_out 0: none.
    """

    def __init__(self, scalars: int, vectors: int, scalars_out: int, vectors_out: int) -> None:
        super().__init__()
        self.widths = [scalars_out, vectors_out]
        self.to_norms = Linear(vectors, vectors, bias=False)
        self.to_vectors = Linear(vectors, vectors_out, bias=False)
        self.hidden = Linear(scalars + vectors, scalars)
        self.output = nn.Linear(scalars, scalars_out + vectors_out)
        for linear in (self.to_norms, self.to_vectors, self.hidden, self.output):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, scalars: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(N,F), (N,3,F') -> (N, scalars_out), (N,3, vectors_out)."""
        norms = torch.linalg.vector_norm(self.to_norms(vectors), dim=1)
        mixed = functional.silu(self.hidden(torch.cat([scalars, norms], dim=1)))
        scalars, gates = self.output(mixed).split(self.widths, 1)
        return functional.silu(scalars), gates[:, None, :] * self.to_vectors(vectors)


class VectorHead(nn.Module):
    """Two gated equivariant blocks, as in the vector output of TorchMD-Net: the result turns with the structure."""

    def __init__(self, scalars: int, vectors: int) -> None:
        super().__init__()
        widths = max(scalars // 2, 1), max(vectors // 2, 1)
        self.first = GatedEquivariant(scalars, vectors, *widths)
        self.second = GatedEquivariant(*widths, 0, 1)

    def forward(self, features: NodeFeatures) -> Tensor:
        """(N,3)."""
        assert features.vectors is not None
        _, vectors = self.second(*self.first(features.scalars, features.vectors))
        found: Tensor = vectors[:, :, 0]
        return found


class ScalarHead(nn.Module):
    """Three numbers of every atom, from its scalars: for networks without vectors.

    Ours, because the paper's head for CGCNN was never published. NOT equivariant: scalars know no direction, so that a
    rotated structure gives the same three numbers. Noise is as likely to point one way as any other, and turned
    structures look alike to this head: the best that it can answer is zero, but for what it remembers of its training
    structures. The loss falls to that of zero (mean square 1 in units of the noise's scale, mean absolute 0.798) and
    stays there: a pre-training by it says nothing of what denoising is worth.
    """

    def __init__(self, scalars: int) -> None:
        super().__init__()
        self.hidden = Linear(scalars, scalars)
        self.output = nn.Linear(scalars, 3)

    def forward(self, features: NodeFeatures) -> Tensor:
        """(N,3)."""
        found: Tensor = self.output(functional.silu(self.hidden(features.scalars)))
        return found


def noise_head(network: EnergyModel) -> nn.Module:
    """A freshly initialised head for the features of `network`, equivariant if it has vectors."""
    if network.num_vectors:
        return VectorHead(network.num_scalars, network.num_vectors)
    return ScalarHead(network.num_scalars)


def predict_noise(model: Scaling, batch: Batch, *, graph: RadiusGraph | None = None) -> Tensor:
    """What the noise head of `model` says of every atom of `batch`: (N,3), in units of the noise's scale.

    graph: `build_graph` of the batch, if it is there already. Raises ValueError for a model without such a head.
    """
    if model.noise_head is None:
        raise ValueError("predict_noise: the model has no noise head, expected one built with noise_head=True")
    if graph is None:
        with part("graph"):
            graph = build_graph(model, batch)
    vectors = edge_vectors(batch.positions, batch.cell, graph, batch.batch)
    found: Tensor = model.noise_head(model.node_features(batch.atomic_numbers, vectors, graph))
    return found

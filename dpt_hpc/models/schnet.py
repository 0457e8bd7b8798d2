"""SchNet (Schütt et al. 2017, NeurIPS; Schütt et al. 2018, J. Chem. Phys. 148, 241722): continuous-filter convolutions.

x_i <- x_i + Linear ssp(Linear sum_j W(d_ij) * (Linear x_j)), W(d) = ssp(Linear ssp(Linear(Gaussians of d))), with the
shifted softplus ssp(x) = ln(0.5 exp(x) + 0.5). Filters end smoothly at the cutoff: W is multiplied by the cosine
cutoff, as SchNetPack (Schütt et al. 2019) has it. The energy is the sum of the atoms' (or their mean).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.models.initial_weights import xavier
from dpt_hpc.models.precision import Linear
from dpt_hpc.models.radial import RadialGrid, RadialPoints, gaussian_basis, spline_coefficients
from dpt_hpc.models.readout import read_out
from dpt_hpc.network_options import Backend, SchNetOptions
from dpt_hpc.ops import RadiusGraph, gather_aggregate, radial_messages


class Interaction(nn.Module):
    """One interaction block: what is to be added to x."""

    def __init__(self, hidden: int, gaussians: int, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.first_filter, self.second_filter = xavier(nn.Linear(gaussians, hidden)), xavier(nn.Linear(hidden, hidden))
        self.to_neighbors = xavier(Linear(hidden, hidden, bias=False))
        self.first, self.second = xavier(Linear(hidden, hidden)), xavier(Linear(hidden, hidden))

    def forward(self, x: Tensor, expanded: Tensor, points: RadialPoints, graph: RadiusGraph) -> Tensor:
        """x (N,F), expanded (L,K): the Gaussians at the points -> (N,F)."""
        filters = ssp(self.second_filter(ssp(self.first_filter(expanded)))) * points.envelope[:, None]
        neighbors = self.to_neighbors(x)
        if points.taps is None:
            message = gather_aggregate(filters, neighbors, graph, self.backend)
        else:
            coefficients = spline_coefficients(filters)
            message, _ = radial_messages(neighbors, points.taps, coefficients, graph, backend=self.backend)
        update: Tensor = self.second(ssp(self.first(message)))
        return update


class SchNet(EnergyModel):
    """embedding -> interaction blocks -> (Linear, ssp) -> Linear for each atom -> pooling."""

    def __init__(self, options: SchNetOptions) -> None:
        super().__init__()
        self.options = options
        self.cutoff = options.cutoff
        self.max_neighbors = options.max_neighbors
        self.max_images = options.max_images
        self.num_scalars, self.num_vectors = options.hidden, 0
        self.grid = RadialGrid(options.cutoff, options.table_knots if options.filters == "table" else None)
        self.basis = gaussian_basis(options.cutoff, options.gaussians, options.gaussian_width)
        self.embedding = nn.Embedding(options.num_elements, options.hidden)
        self.interactions = nn.ModuleList(
            Interaction(options.hidden, options.gaussians, options.backend) for _ in range(options.layers)
        )
        widths = [options.hidden] + [options.readout_hidden] * options.readout_layers
        self.readout = nn.ModuleList(xavier(Linear(a, b)) for a, b in pairwise(widths))
        self.output = xavier(nn.Linear(widths[-1], 1))

    def node_features(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        points = self.grid(torch.linalg.vector_norm(edge_vectors, dim=1))
        expanded = self.basis(points.lengths)
        x = self.embedding.weight.index_select(0, atomic_numbers - 1)
        for interaction in self.interactions:
            x = x + interaction(x, expanded, points, graph)
        return NodeFeatures(x)

    def read_out(self, features: NodeFeatures, atom_ptr: Tensor) -> Tensor:
        x = features.scalars
        for layer in self.readout:
            x = ssp(layer(x))
        return read_out(self.output(x), atom_ptr, self.options.pooling, (), nn.Identity())


def ssp(x: Tensor) -> Tensor:
    """The shifted softplus ln(0.5 exp(x) + 0.5), which is zero at zero."""
    # PyTorch's softplus turns into the identity at `threshold`; at 40 the jump is below float64's rounding.
    return functional.softplus(x, threshold=40) - math.log(2)

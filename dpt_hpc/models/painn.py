"""PaiNN, the polarizable atom interaction neural network (Schütt, Unke & Gastegger 2021, ICML).

Scalars s (N,F) and vectors v (N,3,F) of every atom. A message block (eqs 7, 8) sums over the neighbours, an update
block (eqs 9, 10) mixes scalars and vectors of an atom. Filters W(d) = cutoff(d) Linear(sin(n pi d / r_c) / d) end
smoothly at the cutoff r_c. The energy is the sum of the atoms' (or their mean).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.models.initial_weights import xavier
from dpt_hpc.models.precision import Linear
from dpt_hpc.models.radial import RadialGrid, RadialPoints, spline_coefficients
from dpt_hpc.models.readout import read_out
from dpt_hpc.network_options import Backend, PaiNNOptions
from dpt_hpc.ops import RadialTaps, RadiusGraph, radial_messages

TINY = 1e-4
"""Added to the square of a vector before its root is taken: at an inversion centre all vectors are zero, in float32
rounding noise, and without it the gradient would be NaN, or the noise's direction. The published root has no such term;
it moves the forces of an untrained network by 1.8 %."""


@dataclass(frozen=True)
class Edges:
    """What all layers read of the edges. functions (L,K+1): radial functions and a one for the bias, both times the
    cutoff, at the points · directions (E,3): unit vectors from target to source."""

    points: RadialPoints
    functions: Tensor
    directions: Tensor

    def filters(self, linear: nn.Linear) -> tuple[RadialTaps, Tensor]:
        """taps and filter_weights of the filters cutoff * linear(radial functions)."""
        weights = torch.cat([linear.weight.t(), linear.bias[None]])
        if self.points.taps is not None:
            return self.points.taps, spline_coefficients(self.functions @ weights)
        first = torch.zeros(len(self.functions), dtype=torch.int32, device=self.functions.device)
        return RadialTaps(self.functions, first, weights.shape[0], trainable=False), weights


class Message(nn.Module):
    """Eqs 7, 8: s_j -> its filtered sum, and v_j and the direction to j, filtered and summed."""

    def __init__(self, hidden: int, radial: int, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.first, self.second = xavier(Linear(hidden, hidden)), xavier(Linear(hidden, 3 * hidden))
        self.filters = xavier(nn.Linear(radial, 3 * hidden))

    def forward(self, s: Tensor, v: Tensor, edges: Edges, graph: RadiusGraph) -> tuple[Tensor, Tensor]:
        """s (N,F), v (N,3,F) -> what is to be added to them."""
        values = self.second(functional.silu(self.first(s)))
        taps, weights = edges.filters(self.filters)
        scalars, vectors = radial_messages(
            values, taps, weights, graph, vectors=v, directions=edges.directions, backend=self.backend
        )
        assert vectors is not None
        return scalars, vectors


class Update(nn.Module):
    """Eqs 9, 10: with Uv, Vv and a network of s and |Vv|, ds = a_ss + a_sv <Uv, Vv>, dv = a_vv Uv."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mix = xavier(Linear(hidden, 2 * hidden, bias=False), hidden, hidden)
        self.first, self.second = xavier(Linear(2 * hidden, hidden)), xavier(Linear(hidden, 3 * hidden))

    def forward(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """s (N,F), v (N,3,F) -> what is to be added to them."""
        u, w = self.mix(v).chunk(2, 2)
        norms = (w.square().sum(1) + TINY).sqrt()
        a_ss, a_sv, a_vv = self.second(functional.silu(self.first(torch.cat([s, norms], 1)))).chunk(3, 1)
        return a_ss + a_sv * (u * w).sum(1), a_vv[:, None, :] * u


class PaiNN(EnergyModel):
    """embedding -> (message, update) blocks -> (Linear, SiLU) -> Linear for each atom -> pooling."""

    def __init__(self, options: PaiNNOptions) -> None:
        super().__init__()
        self.options = options
        self.cutoff = options.cutoff
        self.max_neighbors = options.max_neighbors
        self.max_images = options.max_images
        self.num_scalars = self.num_vectors = options.hidden
        self.grid = RadialGrid(options.cutoff, options.table_knots if options.filters == "table" else None)
        self.embedding = nn.Embedding(options.num_elements, options.hidden)
        self.messages = nn.ModuleList(
            Message(options.hidden, options.radial, options.backend) for _ in range(options.layers)
        )
        self.updates = nn.ModuleList(Update(options.hidden) for _ in range(options.layers))
        widths = [options.hidden] + [options.readout_hidden] * options.readout_layers
        self.readout = nn.ModuleList(xavier(Linear(a, b)) for a, b in pairwise(widths))
        self.output = xavier(nn.Linear(widths[-1], 1))

    def node_features(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        lengths = torch.linalg.vector_norm(edge_vectors, dim=1)
        points = self.grid(lengths)
        edges = Edges(points, self._functions(points), edge_vectors / lengths[:, None])
        s = self.embedding.weight.index_select(0, atomic_numbers - 1)
        v = s.new_zeros(s.shape[0], 3, s.shape[1])
        for message, update in zip(self.messages, self.updates, strict=True):
            ds, dv = message(s, v, edges, graph)
            s, v = s + ds, v + dv
            ds, dv = update(s, v)
            s, v = s + ds, v + dv
        return NodeFeatures(s, v)

    def read_out(self, features: NodeFeatures, atom_ptr: Tensor) -> Tensor:
        return read_out(self._energies(features.scalars), atom_ptr, self.options.pooling, (), nn.Identity())

    def _energies(self, s: Tensor) -> Tensor:
        for layer in self.readout:
            s = functional.silu(layer(s))
        energies: Tensor = self.output(s)
        return energies

    def _functions(self, points: RadialPoints) -> Tensor:
        order = torch.arange(1, self.options.radial + 1, dtype=points.lengths.dtype, device=points.lengths.device)
        frequency = order / self.cutoff
        # sin(pi f d) / d as a sinc, which is whole at d = 0, where a table has a knot.
        sines = math.pi * frequency * torch.sinc(points.lengths[:, None] * frequency)
        return points.envelope[:, None] * torch.cat([sines, torch.ones_like(sines[:, :1])], 1)

"""CGCNN as the paper uses it (method.md, "CGCNN"; Xie & Grossman 2018, eq. 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.models.precision import Linear, NodeProducts
from dpt_hpc.models.radial import envelope_of, gaussian_basis, tabulate
from dpt_hpc.models.readout import read_out
from dpt_hpc.network_options import Backend, CGCNNOptions
from dpt_hpc.ops import RadialBasis, RadiusGraph, cgconv, edge_product, gather_aggregate, linear
from dpt_hpc.ops.kept import kept


@dataclass(frozen=True)
class Edges:
    """What all layers read of the edges.

    lengths (E,) Å · basis: the functions of a length that the filters are made of · table (basis.count, radial):
    coefficients of the radial functions in them; None where they are the radial functions · graph · envelope (E,): what
    multiplies the messages · counts (N,1): what the sum over the neighbours is divided by; None: their number.
    """

    lengths: Tensor
    basis: RadialBasis
    table: Tensor | None
    graph: RadiusGraph
    envelope: Tensor | None = None
    counts: Tensor | None = None


class CGConv(NodeProducts):
    """x_i + mean over neighbours j of sigmoid(W_f z + b_f) * softplus(W_s z + b_s), z = [x_i, x_j, e_ij].

    W z is split into W_i x_i + W_j x_j + W_e e_ij: the first two are per atom, and the concatenation never exists.

    The kernel weighs all edges of an atom alike. Under an envelope that multiplies messages it is therefore called with
    every edge as an atom of its own, and its messages, which then exist (E,F), are weighted and summed by the general
    pair: exact and differentiable as ever, but with several tensors of edges x channels. A kernel that did this by
    itself would read w, w' and w'' of each edge: w multiplies the message and its derivatives, w' and w'' add the
    message and its slopes to the derivatives in the length.
    """

    def __init__(self, hidden: int, radial: int, closing: Tensor | None = None) -> None:
        """closing (R,): weights in the gate of R further radial functions, which are not trained."""
        super().__init__()
        self.hidden = hidden
        # Both linear maps in one: rows 0..F-1 are the gate W_f, rows F..2F-1 the filter W_s.
        self.weight = nn.Parameter(torch.empty(2 * hidden, 2 * hidden + radial))
        self.bias = nn.Parameter(torch.empty(2 * hidden))
        bound = 1 / math.sqrt(2 * hidden + radial)  # nn.Linear's default, as in the paper's code
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        gate = torch.arange(2 * hidden) < hidden
        self.closing: Tensor | None
        self.register_buffer("closing", None if closing is None else closing[:, None] * gate, persistent=False)

    def forward(self, x: Tensor, edges: Edges, backend: Backend) -> Tensor:
        """x (N,F) -> (N,F)."""
        target, source, _ = self.parts()
        targets = linear(x, target, self.bias, self.precision)
        sources = linear(x, source, None, self.precision)
        filters = self.filters()
        if edges.table is not None:
            filters = edges.table.to(filters.dtype) @ filters
        lengths, basis, graph = edges.lengths, edges.basis, edges.graph
        if edges.counts is None:
            return x + cgconv(targets, sources, lengths, filters, basis, graph, aggregation="mean", backend=backend)
        if edges.envelope is None:
            return x + cgconv(targets, sources, lengths, filters, basis, graph, "sum", backend) / edges.counts
        ones = torch.ones_like(targets)
        ends = edge_product(targets, ones, graph, backend=backend) + edge_product(ones, sources, graph, backend=backend)
        messages = cgconv(ends, torch.zeros_like(ends), lengths, filters, basis, _edges_alone(graph), "sum", backend)
        total = gather_aggregate(messages * edges.envelope[:, None], ones[:, : self.hidden], graph, backend)
        return x + total / edges.counts

    def parts(self) -> tuple[Tensor, ...]:
        """The columns of the weight that belong to x_i, x_j and e_ij."""
        return self.weight.split([self.hidden, self.hidden, self.weight.shape[1] - 2 * self.hidden], 1)

    def filters(self) -> Tensor:
        """(radial functions, 2F): W_e, transposed, and below it what closes the gate."""
        radial = self.parts()[2].t()
        return radial if self.closing is None else torch.cat([radial, self.closing.to(radial.dtype)])


def _edges_alone(graph: RadiusGraph) -> RadiusGraph:
    """A graph with an atom for each edge, whose only edge it is."""

    def make() -> RadiusGraph:
        edges = torch.arange(graph.num_edges + 1, device=graph.edge_index.device)
        return RadiusGraph(edges[:-1].expand(2, -1).contiguous(), graph.cell_shifts, edges)

    return kept(graph, "edges_alone", graph.edge_index, make)


CLOSED = 40.0
"""What a closed gate has less in its argument: sigmoid(-40) is 4e-18."""


def closing_gaussians(basis: RadialBasis) -> tuple[RadialBasis, Tensor]:
    """The Gaussians of `basis` with those R beyond the cutoff that are felt within it · weights (R,) of these.

    At the cutoff they sum to -CLOSED, and within it they fall off as the integral of a Gaussian does: the gate's odds
    are halved 2.3 widths before the cutoff, and 4 widths before it they are what they were.
    """
    more = math.ceil(9 * basis.width / basis.spacing)
    steps = torch.arange(1, more + 1, dtype=torch.float64) * (basis.spacing / basis.width)
    weight = -CLOSED / torch.exp(-0.5 * steps * steps).sum()
    return replace(basis, count=basis.count + more), weight.expand(more)


def openness(lengths: Tensor, cutoff: float, width: float) -> Tensor:
    """What the odds of a gate are multiplied by where `closing_gaussians` close it, the sum of Gaussians taken as an
    integral: exp(-CLOSED erfc((cutoff - d) / (sqrt(2) width))), lengths (E,) Å. It is what a neighbour counts for."""
    return torch.exp(-CLOSED * torch.erfc((cutoff - lengths) / (math.sqrt(2) * width)))


class CGCNN(EnergyModel):
    """one-hot Z -> Linear, SiLU -> CGConv layers -> pooling -> (Linear, SiLU) x 3 -> Linear."""

    table: Tensor | None

    def __init__(self, options: CGCNNOptions) -> None:
        super().__init__()
        self.options = options
        self.cutoff = options.cutoff
        self.max_neighbors = options.max_neighbors
        self.max_images = options.max_images
        self.num_scalars, self.num_vectors = options.hidden, 0
        basis, closing = gaussian_basis(options.cutoff, options.gaussians, options.gaussian_width), None
        if options.envelope == "gate":
            basis, closing = closing_gaussians(basis)
        table = None
        if options.filters == "table":
            basis, table = tabulate(basis, options.cutoff, options.table_knots)
        self.basis = basis
        # In float64 until the model is cast, so that a float64 model has the whole precision.
        self.register_buffer("table", table, persistent=False)
        self.embedding = nn.Linear(options.num_elements, options.hidden)
        self.convolutions = nn.ModuleList(
            CGConv(options.hidden, options.gaussians, closing) for _ in range(options.layers)
        )
        widths = [options.hidden] + [options.readout_hidden] * options.readout_layers
        self.readout = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        self.output = nn.Linear(widths[-1], 1)

    def node_features(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        edge_lengths = torch.linalg.vector_norm(edge_vectors, dim=1)
        # Linear of a one-hot row is a column of the weight: class c stands for Z = c + 1.
        x = self.embedding.weight.t().index_select(0, atomic_numbers - 1) + self.embedding.bias
        x = functional.silu(x)
        edges = self._edges(edge_lengths, graph)
        for convolution in self.convolutions:
            x = convolution(x, edges, self.options.backend)
        return NodeFeatures(x)

    def read_out(self, features: NodeFeatures, atom_ptr: Tensor) -> Tensor:
        return read_out(features.scalars, atom_ptr, self.options.pooling, self.readout, self.output)

    def _edges(self, lengths: Tensor, graph: RadiusGraph) -> Edges:
        kind = self.options.envelope
        if kind is None:
            return Edges(lengths, self.basis, self.table, graph)
        if kind == "gate":
            weights = openness(lengths, self.cutoff, self.options.gaussian_width * self.cutoff)
        else:
            weights = envelope_of(kind, lengths, self.cutoff)
        counts = 1 + gather_aggregate(
            weights[:, None], weights.new_ones(graph.num_atoms, 1), graph, self.options.backend
        )
        return Edges(lengths, self.basis, self.table, graph, None if kind == "gate" else weights, counts)

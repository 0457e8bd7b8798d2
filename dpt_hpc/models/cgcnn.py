"""CGCNN as the paper uses it (method.md, "CGCNN"; Xie & Grossman 2018, eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.models.options import NetworkOptions
from dpt_hpc.models.precision import Linear, NodeProducts
from dpt_hpc.models.radial import gaussian_basis, tabulate
from dpt_hpc.models.readout import read_out
from dpt_hpc.ops import Backend, RadialBasis, RadiusGraph, cgconv, linear


@dataclass(frozen=True)
class CGCNNOptions(NetworkOptions):
    """Options of CGCNN; the defaults are the paper's experiments, with an exact graph.

    name: the network
    cutoff: Å
    max_neighbors: the nearest neighbours of each atom that are kept; null keeps all
    max_images: periodic images per axis: 1 and 2 reproduce the paper's two codes; null is exact
    num_elements: width of the one-hot encoding of Z
    hidden: node channels F
    layers: how many CGConv layers
    gaussians: how many radial functions
    gaussian_width: their sigma, as a fraction of the cutoff (0.05 in the paper's experiments, 0.2 in its release)
    readout_hidden: width of the read-out
    readout_layers: hidden layers of the read-out
    pooling: sum or mean of the nodes of a structure
    filters: exact evaluates the radial functions on every edge; table interpolates the filters between knots
    table_knots: intervals of that table
    backend: of the messages: native is the fused kernels, reference and pyg are plain twins (dpt_hpc.ops.backends)

    Raises ValueError for a value out of its range.
    """

    least: ClassVar[Mapping[str, int]] = {"gaussians": 4}
    positive: ClassVar[tuple[str, ...]] = ("cutoff", "gaussian_width")

    name: Literal["cgcnn"] = "cgcnn"
    hidden: int = 100
    layers: int = 4
    gaussians: int = 50
    gaussian_width: float = 0.05
    readout_hidden: int = 150
    readout_layers: int = 3


class CGConv(NodeProducts):
    """x_i + mean over neighbours j of sigmoid(W_f z + b_f) * softplus(W_s z + b_s), z = [x_i, x_j, e_ij].

    W z is split into W_i x_i + W_j x_j + W_e e_ij: the first two are per atom, and the concatenation never exists.
    """

    def __init__(self, hidden: int, radial: int) -> None:
        super().__init__()
        self.hidden = hidden
        # Both linear maps in one: rows 0..F-1 are the gate W_f, rows F..2F-1 the filter W_s.
        self.weight = nn.Parameter(torch.empty(2 * hidden, 2 * hidden + radial))
        self.bias = nn.Parameter(torch.empty(2 * hidden))
        bound = 1 / math.sqrt(2 * hidden + radial)  # nn.Linear's default, as in the paper's code
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        edge_lengths: Tensor,
        basis: RadialBasis,
        table: Tensor | None,
        graph: RadiusGraph,
        backend: Backend,
    ) -> Tensor:
        """x (N,F), edge_lengths (E,) Å -> (N,F). table (K, radial): coefficients of the radial functions in `basis`."""
        target, source, radial = self.weight.split(
            [self.hidden, self.hidden, self.weight.shape[1] - 2 * self.hidden], 1
        )
        filters = radial.t() if table is None else table.to(radial.dtype) @ radial.t()
        return x + cgconv(
            linear(x, target, self.bias, self.precision),
            linear(x, source, None, self.precision),
            edge_lengths,
            filters,
            basis,
            graph,
            aggregation="mean",
            backend=backend,
        )


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
        self.embedding = nn.Linear(options.num_elements, options.hidden)
        self.convolutions = nn.ModuleList(CGConv(options.hidden, options.gaussians) for _ in range(options.layers))
        widths = [options.hidden] + [options.readout_hidden] * options.readout_layers
        self.readout = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        self.output = nn.Linear(widths[-1], 1)
        basis = gaussian_basis(options.cutoff, options.gaussians, options.gaussian_width)
        table = None
        if options.filters == "table":
            basis, table = tabulate(basis, options.cutoff, options.table_knots)
        self.basis = basis
        # In float64 until the model is cast, so that a float64 model has the whole precision.
        self.register_buffer("table", table, persistent=False)

    def node_features(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        edge_lengths = torch.linalg.vector_norm(edge_vectors, dim=1)
        # Linear of a one-hot row is a column of the weight: class c stands for Z = c + 1.
        x = self.embedding.weight.t().index_select(0, atomic_numbers - 1) + self.embedding.bias
        x = functional.silu(x)
        for convolution in self.convolutions:
            x = convolution(x, edge_lengths, self.basis, self.table, graph, self.options.backend)
        return NodeFeatures(x)

    def read_out(self, features: NodeFeatures, atom_ptr: Tensor) -> Tensor:
        return read_out(features.scalars, atom_ptr, self.options.pooling, self.readout, self.output)

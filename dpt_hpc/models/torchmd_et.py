"""TorchMD-Net's equivariant transformer (Thölke & De Fabritiis 2022) as the paper uses it (method.md, "TorchMD-Net").

Scalars x (N,C) and vectors v (N,3,C) of every atom. No cutoff on the vector messages, as published; the energy
therefore jumps, by little, when a pair crosses the cutoff, unless the option `envelope` is on.

An atom's edges to its own periodic images are edges like any other, its edge to itself (length zero) does not exist.
TorchMD-Net's code has that self loop; the paper's code for crystals has not, and attends as we do. Its neighbour
embedding however drops all edges whose ends have the same index, meant for self loops, and with them the images: the
option `own_images` is false where that is to be reproduced, and true by default, because the energy of a crystal must
not depend on the size of the cell that describes it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.models.exp_normal import EdgeGeometry, ExpNormal
from dpt_hpc.models.initial_weights import xavier
from dpt_hpc.models.precision import Linear
from dpt_hpc.models.readout import read_out
from dpt_hpc.models.vector_norm import VectorLayerNorm
from dpt_hpc.network_options import TorchMDETOptions
from dpt_hpc.ops import RadiusGraph, radial_messages


class NeighborEmbedding(nn.Module):
    """What an atom starts from: Linear [embedding of Z_i | sum_j f(d) filter(d) * another embedding of Z_j]."""

    def __init__(self, options: TorchMDETOptions) -> None:
        super().__init__()
        self.backend, self.own_images = options.backend, options.own_images
        self.embedding = nn.Embedding(options.num_elements, options.hidden)
        self.filters = xavier(nn.Linear(options.radial, options.hidden))
        self.combine = xavier(Linear(2 * options.hidden, options.hidden))

    def forward(self, x: Tensor, element: Tensor, edges: EdgeGeometry, graph: RadiusGraph) -> Tensor:
        """x (N,C), element (N,): Z - 1 -> (N,C)."""
        weights, bias, _ = edges.filters(self.filters.weight, self.filters.bias, "identity")
        envelope = edges.envelope
        if not self.own_images:
            source, target = graph.edge_index
            envelope = envelope * (source != target)
        neighbors, _ = radial_messages(
            self.embedding.weight.index_select(0, element),
            edges.taps,
            weights,
            graph,
            envelope=envelope,
            filter_bias=bias,
            backend=self.backend,
        )
        return self.combine(torch.cat([x, neighbors], dim=1))


class Attention(nn.Module):
    """Equivariant multi-head attention over the edges j -> i, lengths in keys and values (distance influence "both").

    Matrices that act on the same rows are one: `projection` holds queries, keys and the three parts of the values
    (scalar, vector, direction), `filters` those of the keys and of the three parts, C rows each.
    """

    def __init__(self, options: TorchMDETOptions) -> None:
        super().__init__()
        hidden = options.hidden
        self.heads, self.backend, self.smooth = options.heads, options.backend, options.envelope is not None
        self.norm = nn.LayerNorm(hidden)
        self.projection = xavier(Linear(hidden, 5 * hidden), hidden, hidden, 3 * hidden)
        self.vector_projection = Linear(hidden, 3 * hidden, bias=False)
        self.output_projection = xavier(Linear(hidden, 3 * hidden))
        self.filters = xavier(nn.Linear(options.radial, 4 * hidden), hidden, 3 * hidden)
        nn.init.xavier_uniform_(self.vector_projection.weight)

    def forward(
        self, x: Tensor, vectors: Tensor | None, edges: EdgeGeometry, graph: RadiusGraph, *, vectors_are_read: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (N,C), vectors (N,3,C), None for zero -> what is to be added to them; no vectors if nobody reads them."""
        hidden = x.shape[1]
        queries, keys, values = self.projection(self.norm(x)).split([hidden, hidden, 3 * hidden], 1)
        own_bias: Tensor = self.filters.bias
        if self.smooth:  # the radial functions end at the cutoff, and silu(0) = 0
            own_bias = torch.cat([own_bias[: 2 * hidden], torch.zeros_like(own_bias[2 * hidden :])])
        weights, bias, activation = edges.filters(self.filters.weight, own_bias, "silu")
        if not vectors_are_read:
            values, weights = values[:, :hidden], weights[:, : 2 * hidden]
            bias = None if bias is None else bias[: 2 * hidden]
        message, vector_message = radial_messages(
            values,
            edges.taps,
            weights,
            graph,
            queries=queries,
            keys=keys,
            vectors=(x.new_zeros(x.shape[0], 3, hidden) if vectors is None else vectors) if vectors_are_read else None,
            directions=edges.directions if vectors_are_read else None,
            envelope=edges.envelope,
            filter_bias=bias,
            activation=activation,
            heads=self.heads,
            backend=self.backend,
        )
        to_vectors, to_product, to_scalars = self.output_projection(message).split(hidden, 1)
        if vectors is None:
            return to_scalars, vector_message
        first, second, third = self.vector_projection(vectors).split(hidden, 2)
        scalars = (first * second).sum(1) * to_product + to_scalars
        if vector_message is None:
            return scalars, None
        return scalars, third * to_vectors[:, None, :] + vector_message


class TorchMDET(EnergyModel):
    """embedding -> neighbour embedding -> attention layers -> LayerNorm -> pooling -> (Linear, SiLU) x 2 -> Linear."""

    def __init__(self, options: TorchMDETOptions) -> None:
        super().__init__()
        self.options = options
        self.cutoff = options.cutoff
        self.max_neighbors = options.max_neighbors
        self.max_images = options.max_images
        self.num_scalars = self.num_vectors = options.hidden
        self.radial = ExpNormal(
            options.radial, options.cutoff, options.table_knots if options.filters == "table" else None
        )
        self.embedding = nn.Embedding(options.num_elements, options.hidden)
        self.neighbors = NeighborEmbedding(options)
        self.layers = nn.ModuleList(Attention(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.hidden)
        self.vector_norm = None if options.vector_norm is None else VectorLayerNorm(options.hidden)
        widths = [options.hidden] + [options.readout_hidden] * options.readout_layers
        self.readout = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        self.output = nn.Linear(widths[-1], 1)

    def node_features(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        return self._layers(atomic_numbers, edge_vectors, graph, vectors_are_read=True)

    def features_for_energy(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        return self._layers(atomic_numbers, edge_vectors, graph, vectors_are_read=False)

    def read_out(self, features: NodeFeatures, atom_ptr: Tensor) -> Tensor:
        return read_out(features.scalars, atom_ptr, self.options.pooling, self.readout, self.output)

    def _layers(
        self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph, *, vectors_are_read: bool
    ) -> NodeFeatures:
        edges = self.radial(edge_vectors)
        element = atomic_numbers - 1
        x = self.neighbors(self.embedding.weight.index_select(0, element), element, edges, graph)
        vectors: Tensor | None = None
        for k, layer in enumerate(self.layers):
            # The vectors that leave the last layer reach no energy: only a head can ask for them.
            read = vectors_are_read or k + 1 < len(self.layers)
            dx, more = layer(x, vectors, edges, graph, vectors_are_read=read)
            x = x + dx
            vectors = more if vectors is None or more is None else vectors + more
        if vectors_are_read and vectors is not None and self.vector_norm is not None:
            vectors = self.vector_norm(vectors)
        return NodeFeatures(self.norm(x), vectors)

"""Slow plain twins of the native operations: the oracle of the tests, and the backend "reference"."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dpt_hpc.ops.radial_basis import RadialBasis
from dpt_hpc.ops.radial_taps import RadialTaps
from dpt_hpc.ops.radius_graph import RadiusGraph

SumRows = Callable[[Tensor, Tensor, int], Tensor]
"""How a twin sums rows by index: (index (E,), rows (E,...), count) -> (count,...). The backend pyg hands in its own."""


def sum_rows(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """Row k of the result is the sum of the rows e with index[e] = k: (E,), (E,...) -> (count,...)."""
    return rows.new_zeros(count, *rows.shape[1:]).index_add(0, index, rows)


def radius_graph(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    atom_ptr: Tensor,
    cutoff: float,
    max_neighbors: int | None = None,
    max_images: int | None = None,
) -> RadiusGraph:
    """Brute force over all pairs and all images that can matter, in float64; arguments as `dpt_hpc.ops.radius_graph`.

    Holds (atoms x atoms x images) distances of one structure at a time, on the CPU. Structures must be sound.
    """
    device = positions.device
    positions, cell, pbc, atom_ptr = positions.cpu(), cell.cpu(), pbc.cpu(), atom_ptr.cpu()
    sources, targets, shifts, lengths = [], [], [], []
    for b in range(cell.shape[0]):
        first, last = int(atom_ptr[b]), int(atom_ptr[b + 1])
        x, lattice = positions[first:last].detach().double(), cell[b].detach().double()
        if last == first:
            continue
        home, reach = home_images(x, lattice, pbc[b], cutoff)
        steps = torch.tensor(list(itertools.product(*(range(-r, r + 1) for r in reach))), dtype=torch.float64)
        images = home[:, :, None, :] + steps
        vectors = (x[None, :, :] - x[:, None, :])[:, :, None, :] + images @ lattice
        squares = vectors.square().sum(-1)
        inside = squares <= cutoff * cutoff
        inside &= ~(torch.eye(last - first, dtype=torch.bool)[:, :, None] & images.eq(0).all(-1))
        if max_images is not None:
            inside &= images.abs().amax(-1) <= max_images
        target, source, step = inside.nonzero(as_tuple=True)
        sources.append(source + first)
        targets.append(target + first)
        shifts.append(images[target, source, step].to(torch.int32))
        lengths.append(squares[target, source, step])
    source, target = (torch.cat(v) if v else torch.empty(0, dtype=torch.int64) for v in (sources, targets))
    shift = torch.cat(shifts) if shifts else torch.empty((0, 3), dtype=torch.int32)
    square = torch.cat(lengths) if lengths else torch.empty(0, dtype=torch.float64)
    source, target, shift, square = (t.to(device) for t in (source, target, shift, square))
    return graph_of(source, target, shift, square, positions.shape[0], max_neighbors)


def graph_of(
    source: Tensor, target: Tensor, shift: Tensor, squares: Tensor, num_atoms: int, max_neighbors: int | None
) -> RadiusGraph:
    """The graph of edges that are sorted by (target, source, shift): source, target (E,), shift (E,3) int32, squared
    lengths (E,) Å². With max_neighbors, the nearest ones of each atom."""
    counts = torch.bincount(target, minlength=num_atoms)
    truncated = 0
    if max_neighbors is not None:
        truncated = int((counts > max_neighbors).sum())
        by_distance = torch.argsort(squares, stable=True)
        by_row = by_distance[torch.argsort(target[by_distance], stable=True)]
        starts = counts.cumsum(0) - counts
        place = torch.arange(by_row.shape[0], device=target.device) - starts[target[by_row]]
        kept = by_row[place < max_neighbors].sort().values
        source, target, shift = source[kept], target[kept], shift[kept]
        counts = counts.clamp(max=max_neighbors)
    target_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return RadiusGraph(torch.stack([source, target]), shift, target_ptr, truncated)


def home_images(x: Tensor, lattice: Tensor, pbc: Tensor, cutoff: float) -> tuple[Tensor, list[int]]:
    """The image n of atom j with the fractions nearest to atom i's, (n,n,3) as [i,j], and how far the images within the
    cutoff can be from it on each axis: |n + difference of fractions| <= cutoff / height, and the difference is rounded.
    """
    home, reach = torch.zeros(*x.shape[:1], *x.shape[:1], 3, dtype=torch.float64), [0, 0, 0]
    axes = [a for a in range(3) if bool(pbc[a])]
    if axes:
        # Columns are dual vectors within the span of the periodic ones: their lengths are 1 / height.
        dual = torch.linalg.pinv(lattice[axes])
        home[:, :, axes] = -((x[None, :, :] - x[:, None, :]) @ dual).round()
        for a, inverse_height in zip(axes, dual.norm(dim=0).tolist(), strict=True):
            reach[a] = int(cutoff * inverse_height + 0.5 + 1e-6)
    return home, reach


def cgconv(
    target_features: Tensor,
    source_features: Tensor,
    edge_lengths: Tensor,
    filter_weights: Tensor,
    basis: RadialBasis,
    graph: RadiusGraph,
    aggregation: str = "mean",
    *,
    sum_rows: SumRows = sum_rows,
) -> Tensor:
    """As `dpt_hpc.ops.cgconv`, with every (E, 2F) tensor stored; differentiable any number of times."""
    source, target = graph.edge_index
    z = target_features.index_select(0, target) + source_features.index_select(0, source)
    gate, filter_ = (z + basis(edge_lengths) @ filter_weights).chunk(2, dim=1)
    # PyTorch's softplus turns into the identity at `threshold`; at 40 the jump is below float64's rounding.
    messages = torch.sigmoid(gate) * functional.softplus(filter_, threshold=40)
    y = sum_rows(target, messages, graph.num_atoms)
    if aggregation == "mean":
        y = y / graph.target_ptr.diff().clamp(min=1)[:, None].to(y.dtype)
    return y


def radial_messages(
    values: Tensor,
    taps: RadialTaps,
    filter_weights: Tensor,
    graph: RadiusGraph,
    *,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    vectors: Tensor | None = None,
    directions: Tensor | None = None,
    envelope: Tensor | None = None,
    filter_bias: Tensor | None = None,
    activation: str = "identity",
    heads: int = 1,
    sum_rows: SumRows = sum_rows,
) -> tuple[Tensor, Tensor | None]:
    """As `dpt_hpc.ops.radial_messages`, with every (E, channels) tensor stored; differentiable any number of times."""
    source, target = graph.edge_index
    filters = taps.dense() @ filter_weights
    if filter_bias is not None:
        filters = filters + filter_bias
    if activation == "silu":
        filters = functional.silu(filters)
    channels = values.shape[1] // (1 if vectors is None else 3)
    parts = list(filters.split(channels, dim=1))
    value = values.index_select(0, source).split(channels, dim=1)

    weight = value[0].new_ones(graph.num_edges, 1)
    if queries is not None and keys is not None:
        products = queries.index_select(0, target) * keys.index_select(0, source) * parts.pop(0)
        weight = functional.silu(products.view(graph.num_edges, heads, channels // heads).sum(-1))
    if envelope is not None:
        weight = weight * envelope[:, None]
    weight = weight.repeat_interleave(channels // weight.shape[1], dim=1)
    x = sum_rows(target, weight * value[0] * parts[0], graph.num_atoms)
    if vectors is None or directions is None:
        return x, None
    along_vectors = vectors.index_select(0, source) * (value[1] * parts[1])[:, None, :]
    along_edges = directions[:, :, None] * (value[2] * parts[2])[:, None, :]
    return x, sum_rows(target, along_vectors + along_edges, graph.num_atoms)


def gather_aggregate(weights: Tensor, features: Tensor, graph: RadiusGraph, *, sum_rows: SumRows = sum_rows) -> Tensor:
    """As `dpt_hpc.ops.gather_aggregate`, with the (E,F) messages stored."""
    source, target = graph.edge_index
    return sum_rows(target, weights * features.index_select(0, source), graph.num_atoms)


def edge_product(targets: Tensor, sources: Tensor, graph: RadiusGraph, reduce: bool = False) -> Tensor:
    """As `dpt_hpc.ops.edge_product`."""
    source, target = graph.edge_index
    product = targets.index_select(0, target) * sources.index_select(0, source)
    return product.sum(1, keepdim=True) if reduce else product

"""The fused CGConv message on a GPU: its orders of the edges, its workspace, and the calls of its kernels."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dpt_hpc.ops.kept import captures
from dpt_hpc.ops.radial_basis import RadialBasis
from dpt_hpc.ops.radius_graph import RadiusGraph

# Edges of a chunk whose contributions to the table are summed at once, and the chunks that there are at most: the
# workspace of the splines is 4 rows of the table per chunk, that of the Gaussians a whole table.
SPLINE_CHUNK, MOST_SPLINE_CHUNKS = 128, 8192
GAUSSIAN_CHUNK, MOST_GAUSSIAN_CHUNKS = 128, 256

_kept: weakref.WeakKeyDictionary[RadiusGraph, dict[Any, Any]] = weakref.WeakKeyDictionary()


def run(
    kernels: Any,
    name: str,
    basis: RadialBasis,
    graph: RadiusGraph,
    mean: bool,
    edge_lengths: Tensor,
    tensors: dict[str, Tensor],
) -> None:
    """A pass `name` of `kernels` (dpt_hpc._C).

    `tensors`: what the pass reads and writes, by the names of its arguments, contiguous and on one device;
    `edge_lengths`: the lengths as the caller holds them. Everything is launched on the current stream of the device,
    and nothing waits for it.
    """
    a = tensors["a"]
    pass_ = getattr(kernels, f"cuda_{name}_{'float32' if a.dtype == torch.float32 else 'float64'}")
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if a.is_cuda else 0
        sources, targets = graph.edge_index.contiguous()
        held = {"target_ptr": graph.target_ptr.contiguous(), "source": sources, "target": targets, **tensors}
        sizes: dict[str, int] = {}
        if "out_b" in tensors:
            held["source_order"], held["source_ptr"] = graph.by_source
        if "out_table" in tensors:
            sizes["chunk_edges"], sizes["num_chunks"], orders = _table_chunks(basis, graph, edge_lengths, stream)
            held |= orders
            rows = 4 if basis.kind == "bspline" else basis.count
            held["chunk_sums"] = a.new_empty(sizes["num_chunks"], rows, a.shape[1])
        pass_(
            num_atoms=a.shape[0],
            num_edges=graph.num_edges,
            mean=mean,
            spline=basis.kind == "bspline",
            count=basis.count,
            start=basis.start,
            spacing=basis.spacing,
            width=basis.width,
            channels=a.shape[1] // 2,
            **sizes,
            **{key: t.data_ptr() for key, t in held.items()},
            stream=stream,
        )


def _table_chunks(
    basis: RadialBasis, graph: RadiusGraph, lengths: Tensor, stream: int
) -> tuple[int, int, dict[str, Tensor]]:
    """Edges of a chunk, number of chunks, and with splines the order of the edges by interval (csrc/cgconv.h)."""
    edges = graph.num_edges
    if basis.kind == "gaussian":
        chunk = max(GAUSSIAN_CHUNK, -(-edges // MOST_GAUSSIAN_CHUNKS))
        return chunk, -(-edges // chunk), {}
    chunk = max(SPLINE_CHUNK, -(-edges // MOST_SPLINE_CHUNKS))
    intervals = basis.count + 5
    # Layers of a network share their lengths: the order is kept with the graph, until the lengths change. Not while a
    # CUDA graph is captured, which must compute everything again at every replay.
    kept = _kept.setdefault(graph, {})
    key = (basis, stream)
    known, version, orders = kept.get(key, (None, None, None))
    if known is None or known() is not lengths or version != lengths._version or captures(lengths):
        orders = _by_interval(basis, lengths.detach(), intervals, chunk)
        if not captures(lengths):
            kept[key] = weakref.ref(lengths), lengths._version, orders
    return chunk, edges // chunk + min(edges, intervals), orders


def _by_interval(basis: RadialBasis, lengths: Tensor, intervals: int, chunk: int) -> dict[str, Tensor]:
    knots = ((lengths - basis.start) * (1 / basis.spacing)).clamp(-3, basis.count + 1).nan_to_num(0.0)
    # Narrow keys: a GPU sorts 8 bits at a time.
    kind = torch.int16 if intervals < 2**15 else torch.int32
    by_interval, order = torch.sort((knots.floor() + 3).to(kind), stable=True)
    borders = torch.arange(intervals + 1, dtype=kind, device=lengths.device)
    ptr = torch.searchsorted(by_interval, borders)
    chunks = (ptr.diff() + (chunk - 1)) // chunk
    return {
        "interval_ptr": ptr,
        "interval_order": order,
        "chunk_ptr": torch.cat([chunks.new_zeros(1), chunks.cumsum(0)]),
    }

"""The general pair of message passing: a weighted sum over neighbours, and its product along edges."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dpt_hpc import _C
from dpt_hpc.network_options import Backend
from dpt_hpc.ops.autograd import apply, asked
from dpt_hpc.ops.backends import plain_twins, refuse_other_devices
from dpt_hpc.ops.radius_graph import RadiusGraph


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gather_aggregate(weights: Tensor, features: Tensor, graph: RadiusGraph, backend: Backend = "native") -> Tensor:
    """y_i = sum over the edges e = (j -> i) of weights_e * features_j: any convolution whose messages are products.

    weights (E,F), or (E,1) for one weight per edge · features (N,F) -> (N,F); 0 for an atom without neighbours. All
    float32 or all float64. Nothing of shape (E,F) is stored besides the weights. SchNet's continuous-filter
    convolution is one call with the filters as weights (Schütt et al. 2018, eq. 5), and PaiNN's message is one call
    per Cartesian component and part (Schütt et al. 2021, eqs. 7 and 8).

    Differentiable any number of times: its gradients are `edge_product` and itself on the transposed graph. The bits
    depend neither on the number of threads nor on the processor, and are the GPU's.

    Under torch.compile this is a graph break. Errors: TypeError and ValueError for arguments of a wrong kind.
    """
    channels = features.shape[1] if features.ndim == 2 else 0
    width = 1 if weights.ndim == 2 and weights.shape[1] == 1 else channels
    _check_arguments(
        "gather_aggregate",
        graph,
        ("features", features, (graph.num_atoms, channels)),
        ("weights", weights, (graph.num_edges, width)),
    )
    if backend != "native":
        twin: Tensor = plain_twins(backend, "gather_aggregate").gather_aggregate(weights, features, graph)
        return twin
    refuse_other_devices("gather_aggregate", features)
    return _gather(weights, features, _Ends(graph))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def edge_product(
    targets: Tensor, sources: Tensor, graph: RadiusGraph, reduce: bool = False, backend: Backend = "native"
) -> Tensor:
    """p_e = targets_i * sources_j for each edge e = (j -> i), or the scalar products of the rows with `reduce`.

    targets, sources (N,F) -> (E,F), or (E,1) with `reduce`. The rest is as for `gather_aggregate`, of which it is the
    derivative.
    """
    channels = targets.shape[1] if targets.ndim == 2 else 0
    shape = (graph.num_atoms, channels)
    _check_arguments("edge_product", graph, ("targets", targets, shape), ("sources", sources, shape))
    if backend != "native":
        twin: Tensor = plain_twins(backend, "edge_product").edge_product(targets, sources, graph, reduce)
        return twin
    refuse_other_devices("edge_product", targets)
    return _product(targets, sources, _Ends(graph), reduce)


@dataclass(frozen=True)
class _Ends:
    """A graph, or its transpose: the same edges with their two ends exchanged."""

    graph: RadiusGraph
    transposed: bool = False
    kernels: Any = None
    """The module whose CUDA kernels are called; None: dpt_hpc._C, on the device of the tensors."""

    @property
    def transpose(self) -> _Ends:
        return _Ends(self.graph, not self.transposed, self.kernels)

    def run(self, name: str, like: Tensor, **arguments: Tensor | int | None) -> None:
        """Call a kernel on contiguous tensors of one device and dtype."""
        kernels = self.kernels or _C
        cuda = like.is_cuda or self.kernels is not None
        name = f"{'cuda_' if cuda else ''}{name}_{'float32' if like.dtype == torch.float32 else 'float64'}"
        place = {"threads": torch.get_num_threads()}
        if cuda:
            place = {"stream": torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0}
        values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in arguments.items() if v is not None}
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            getattr(kernels, name)(**values, **place)

    def sum(self, weights: Tensor, features: Tensor) -> Tensor:
        source, target = self.graph.edge_index.contiguous()
        order, ptr = self.graph.by_source if self.transposed else (None, self.graph.target_ptr.contiguous())
        weights, features = weights.contiguous(), features.contiguous()
        y = torch.empty_like(features)
        self.run(
            "gather_aggregate",
            features,
            num_rows=self.graph.num_atoms,
            ptr=ptr,
            edge=order,
            other=target if self.transposed else source,
            channels=features.shape[1],
            shared=weights.shape[1] == 1,
            weights=weights,
            features=features,
            out=y,
        )
        return y

    def product(self, targets: Tensor, sources: Tensor, reduce: bool) -> Tensor:
        source, target = self.graph.edge_index.contiguous()
        targets, sources = targets.contiguous(), sources.contiguous()
        p = targets.new_empty(self.graph.num_edges, 1 if reduce else targets.shape[1])
        self.run(
            "edge_product",
            targets,
            num_edges=self.graph.num_edges,
            target=source if self.transposed else target,
            source=target if self.transposed else source,
            channels=targets.shape[1],
            shared=reduce,
            targets=targets,
            sources=sources,
            out=p,
        )
        return p


class _Gather(Function):
    """Inputs: weights (E,F) or (E,1), features (N,F) -> (N,F)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        weights, features, ends = inputs
        ctx.save_for_backward(weights, features)
        ctx.ends = ends
        y: Tensor = ends.sum(weights, features)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weights, features), (grad,) = ctx.saved_tensors, gradients
        reduce = weights.shape[1] == 1
        return (
            _product(grad, features, ctx.ends, reduce) if asked(ctx, 0) else None,
            _gather(weights, grad, ctx.ends.transpose) if asked(ctx, 1) else None,
            None,
        )


class _Product(Function):
    """Inputs: targets, sources (N,F), whether to reduce -> (E,F) or (E,1)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        targets, sources, ends, reduce = inputs
        ctx.save_for_backward(targets, sources)
        ctx.ends = ends
        p: Tensor = ends.product(targets, sources, reduce)
        return p

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (targets, sources), (grad,) = ctx.saved_tensors, gradients
        return (
            _gather(grad, sources, ctx.ends) if asked(ctx, 0) else None,
            _gather(grad, targets, ctx.ends.transpose) if asked(ctx, 1) else None,
            None,
            None,
        )


def _gather(weights: Tensor, features: Tensor, ends: _Ends) -> Tensor:
    y: Tensor = apply(_Gather, weights, features, ends)
    return y


def _product(targets: Tensor, sources: Tensor, ends: _Ends, reduce: bool) -> Tensor:
    p: Tensor = apply(_Product, targets, sources, ends, reduce)
    return p


def _check_arguments(op: str, graph: RadiusGraph, *arguments: tuple[str, Tensor, tuple[int, int]]) -> None:
    first, like, _ = arguments[0]
    for name, value, shape in arguments:
        if tuple(value.shape) != shape or shape[1] == 0:
            wanted = f"({shape[0]}, F)" if value is like else f"{shape}"
            raise ValueError(f"{op}: {name}: expected shape {wanted}, got {tuple(value.shape)}.")
        if value.dtype != like.dtype or value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{op}: {name}: expected float32 or float64 as all its tensors, got {value.dtype} beside {like.dtype}."
            )
        if not value.device == like.device == graph.edge_index.device:
            raise ValueError(
                f"{op}: {name}: expected the device of {first} and of the graph, {like.device} and "
                f"{graph.edge_index.device}, got {value.device}."
            )

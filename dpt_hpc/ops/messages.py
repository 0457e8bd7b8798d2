"""The fused CGConv message: checks, autograd, and the calls of the native kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from dpt_hpc import _C
from dpt_hpc.network_options import Backend
from dpt_hpc.ops import messages_cuda
from dpt_hpc.ops.autograd import Scope, apply, asked, current_scope, third_derivative
from dpt_hpc.ops.backends import plain_twins, refuse_other_devices
from dpt_hpc.ops.radial_basis import RadialBasis
from dpt_hpc.ops.radius_graph import RadiusGraph

Aggregation = Literal["mean", "sum"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def cgconv(
    target_features: Tensor,
    source_features: Tensor,
    edge_lengths: Tensor,
    filter_weights: Tensor,
    basis: RadialBasis,
    graph: RadiusGraph,
    aggregation: Aggregation = "mean",
    backend: Backend = "native",
) -> Tensor:
    """Gated messages (Xie & Grossman 2018, eq. 5) and their aggregation, without a tensor of edges x channels.

    y_i = mean or sum over the edges e = (j -> i) of sigmoid(g) * softplus(s),
    (g | s) = target_features_i + source_features_j + sum_k phi_k(edge_lengths_e) filter_weights_k.

    target_features, source_features (N,2F), gate first, then filter · edge_lengths (E,) Å, of graph.edge_index ·
    filter_weights (K,2F), K = basis.count -> (N,F). An atom without neighbours gets 0. All float32 or all float64.
    Differentiable twice with respect to all four tensors; a third derivative raises NotImplementedError. The bits do
    not depend on the number of threads (torch.get_num_threads() are used). In float32 a Gaussian is taken as zero
    where it is below 1e-9.

    Under torch.compile this is a graph break. Errors: TypeError and ValueError for arguments of a wrong kind.
    """
    _check_arguments(target_features, source_features, edge_lengths, filter_weights, basis, graph, aggregation)
    if backend != "native":
        twin: Tensor = plain_twins(backend, "cgconv").cgconv(
            target_features, source_features, edge_lengths, filter_weights, basis, graph, aggregation
        )
        return twin
    refuse_other_devices("cgconv", target_features)
    cuda = _C if target_features.is_cuda else None
    return fused(target_features, source_features, edge_lengths, filter_weights, basis, graph, aggregation, cuda)


def fused(
    target_features: Tensor,
    source_features: Tensor,
    edge_lengths: Tensor,
    filter_weights: Tensor,
    basis: RadialBasis,
    graph: RadiusGraph,
    aggregation: Aggregation = "mean",
    cuda: Any = None,
) -> Tensor:
    """cgconv by the native kernels, without its checks. `cuda`: the module with the CUDA kernels that are to run,
    dpt_hpc._C or the tests' emulation of it; None runs the CPU's."""
    message = _Message(basis, graph, aggregation == "mean", cuda)
    result: Tensor = apply(_CGConv, target_features, source_features, edge_lengths, filter_weights, message)
    return result


@dataclass(frozen=True)
class _Message:
    """What a call keeps besides its tensors."""

    basis: RadialBasis
    graph: RadiusGraph
    mean: bool
    cuda: Any = None
    scope: Scope | None = field(default_factory=current_scope)

    @property
    def lengths_are_constant(self) -> bool:
        return self.scope is not None and self.scope.closed

    def run(self, name: str, inputs: tuple[Tensor, ...], **pointers: Tensor | None) -> None:
        """Call a native pass on (target_features, source_features, edge_lengths, filter_weights)."""
        a, b, lengths, table = (t.detach().contiguous() for t in inputs)
        held = {key: t.detach().contiguous() for key, t in pointers.items() if t is not None}
        if self.cuda is not None:
            held |= {"a": a, "b": b, "lengths": lengths, "table": table}
            messages_cuda.run(self.cuda, name, self.basis, self.graph, self.mean, inputs[2], held)
            return
        native = getattr(_C, f"{name}_{'float32' if a.dtype == torch.float32 else 'float64'}")
        source = self.graph.edge_index[0].contiguous()
        target_ptr = self.graph.target_ptr.contiguous()
        native(
            num_atoms=a.shape[0],
            target_ptr=target_ptr.data_ptr(),
            source=source.data_ptr(),
            mean=self.mean,
            spline=self.basis.kind == "bspline",
            count=self.basis.count,
            start=self.basis.start,
            spacing=self.basis.spacing,
            width=self.basis.width,
            channels=a.shape[1] // 2,
            a=a.data_ptr(),
            b=b.data_ptr(),
            lengths=lengths.data_ptr(),
            table=table.data_ptr(),
            **{key: t.data_ptr() for key, t in held.items()},
            threads=torch.get_num_threads(),
        )


class _CGConv(Function):
    """Inputs: a, b (N,2F), lengths (E,), table (K,2F) -> y (N,F)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, message = inputs
        ctx.save_for_backward(*tensors)
        ctx.message = message
        y = tensors[0].new_empty(tensors[0].shape[0], tensors[0].shape[1] // 2)
        message.run("cgconv_forward", tuple(tensors), out_y=y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        wanted = tuple(asked(ctx, k) and not (k == 2 and ctx.message.lengths_are_constant) for k in range(4))
        if not any(wanted):
            return None, None, None, None, None
        return *apply(_CGConvBackward, *gradients, *ctx.saved_tensors, ctx.message, wanted), None


class _CGConvBackward(Function):
    """Inputs: grad_y (N,F), a, b, lengths, table -> the gradients of the last four, None where not wanted."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        grad_y, *tensors, message, wanted = inputs
        ctx.save_for_backward(grad_y, *tensors)
        ctx.message = message
        ctx.set_materialize_grads(False)
        results = tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format) if w else None
            for t, w in zip(tensors, wanted, strict=True)
        )
        out_a, out_b, out_lengths, out_table = results
        message.run(
            "cgconv_backward",
            tuple(tensors),
            grad_y=grad_y,
            out_a=out_a,
            out_b=out_b,
            out_lengths=out_lengths,
            out_table=out_table,
        )
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        wanted = tuple(asked(ctx, k) and not (k == 3 and ctx.message.lengths_are_constant) for k in range(5))
        if not any(wanted) or all(g is None for g in gradients):
            return (None,) * 7
        return *apply(_CGConvDoubleBackward, *ctx.saved_tensors, *gradients, ctx.message, wanted), None, None


class _CGConvDoubleBackward(Function):
    """Inputs: grad_y, a, b, lengths, table, cotangents of the gradients of the last four -> gradients of the first
    five, None where not wanted."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        grad_y, *tensors = inputs[:5]
        along_a, along_b, along_lengths, along_table, message, wanted = inputs[5:]
        results = tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format) if w else None
            for t, w in zip((grad_y, *tensors), wanted, strict=True)
        )
        out_y, out_a, out_b, out_lengths, out_table = results
        message.run(
            "cgconv_double_backward",
            tuple(tensors),
            grad_y=grad_y,
            along_a=along_a,
            along_b=along_b,
            along_lengths=along_lengths,
            along_table=along_table,
            out_y=out_y,
            out_a=out_a,
            out_b=out_b,
            out_lengths=out_lengths,
            out_table=out_table,
        )
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise third_derivative("cgconv")


def _check_arguments(
    target_features: Tensor,
    source_features: Tensor,
    edge_lengths: Tensor,
    filter_weights: Tensor,
    basis: RadialBasis,
    graph: RadiusGraph,
    aggregation: str,
) -> None:
    width = target_features.shape[1] if target_features.ndim == 2 else 0
    if width == 0 or width % 2:
        raise ValueError(
            f"cgconv: target_features: expected (N, 2F), gate and filter, got {tuple(target_features.shape)}."
        )
    for name, value, shape in (
        ("target_features", target_features, (graph.num_atoms, width)),
        ("source_features", source_features, (graph.num_atoms, width)),
        ("edge_lengths", edge_lengths, (graph.num_edges,)),
        ("filter_weights", filter_weights, (basis.count, width)),
    ):
        if tuple(value.shape) != shape:
            raise ValueError(f"cgconv: {name}: expected shape {shape}, got {tuple(value.shape)}.")
        if value.dtype != target_features.dtype or value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"cgconv: {name}: expected float32 or float64 as all its tensors, got {value.dtype} beside "
                f"{target_features.dtype}."
            )
        if not value.device == target_features.device == graph.edge_index.device:
            raise ValueError(
                f"cgconv: {name}: expected the device of target_features and of the graph, {target_features.device} "
                f"and {graph.edge_index.device}, got {value.device}."
            )
    if aggregation not in ("mean", "sum"):
        raise ValueError(f"cgconv: aggregation: expected mean or sum, got {aggregation!r}.")

"""Fused messages with radial filters: checks, autograd, and the calls of the native kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from dpt_hpc import _C
from dpt_hpc.network_options import Backend
from dpt_hpc.ops import radial_messages_cuda
from dpt_hpc.ops.autograd import Scope, apply, asked, current_scope, third_derivative
from dpt_hpc.ops.backends import plain_twins, refuse_other_devices
from dpt_hpc.ops.radial_taps import RadialTaps
from dpt_hpc.ops.radius_graph import RadiusGraph

Activation = Literal["identity", "silu"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    activation: Activation = "identity",
    heads: int = 1,
    backend: Backend = "native",
) -> tuple[Tensor, Tensor | None]:
    """Messages along edges e = (j -> i) with filters F_e = act(taps_e @ filter_weights + filter_bias), summed over e,
    without a tensor of edges x channels. C channels, H heads; c is a channel of head h = c // (C / H).

    x_i = sum_e a_eh v^x_j F^x_e;  a_eh = silu(sum_{c in h} q_i k_j F^k_e) * envelope_e, or envelope_e alone without
    queries and keys; an envelope of None is 1. With vectors and directions also
    vectors_i = sum_e (vectors_j v^1_j F^1_e + directions_e v^2_j F^2_e), for each of x, y, z.

    This is the message of the equivariant transformer (Thölke & De Fabritiis 2022, eqs 4-9) and, by its switches, of
    its neighbour embedding, of SchNet (Schütt 2017, eq. 1) and of PaiNN (Schütt 2021, eqs 7-8).

    values (N,C), or (N,3C) = [v^x|v^1|v^2] with vectors · taps of graph.edge_index, M values of K functions each ·
    filter_weights (K,nC), filter_bias (nC,) or None: columns [F^k|F^x|F^1|F^2], those parts that are there · queries,
    keys (N,C), both or none · vectors (N,3,C), directions (E,3), both or none · envelope (E,) or None · activation of
    the filters -> x (N,C), and (N,3,C) or None. All float32 or all float64.
    Differentiable twice with respect to all of these; a third derivative raises NotImplementedError. The bits do not
    depend on the number of threads (torch.get_num_threads() are used). Rows of filter_weights outside the window of an
    edge have no part in its message, unless they are not finite: then, as 0 * inf, they may. After `inner_derivative`
    there is no gradient for directions, envelope and taps that are not trainable.

    Under torch.compile this is a graph break. Errors: TypeError and ValueError for arguments of a wrong kind.
    """
    tensors = {
        "values": values,
        "taps.values": taps.values,
        "filter_weights": filter_weights,
        "queries": queries,
        "keys": keys,
        "vectors": vectors,
        "directions": directions,
        "envelope": envelope,
        "filter_bias": filter_bias,
    }
    _check_arguments(tensors, taps, graph, activation, heads)
    if backend != "native":
        twin: tuple[Tensor, Tensor | None] = plain_twins(backend, "radial_messages").radial_messages(
            values,
            taps,
            filter_weights,
            graph,
            queries=queries,
            keys=keys,
            vectors=vectors,
            directions=directions,
            envelope=envelope,
            filter_bias=filter_bias,
            activation=activation,
            heads=heads,
        )
        return twin
    refuse_other_devices("radial_messages", values)
    return fused(
        values,
        taps,
        filter_weights,
        graph,
        queries=queries,
        keys=keys,
        vectors=vectors,
        directions=directions,
        envelope=envelope,
        filter_bias=filter_bias,
        activation=activation,
        heads=heads,
        cuda=_C if values.is_cuda else None,
    )


def fused(
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
    activation: Activation = "identity",
    heads: int = 1,
    cuda: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """radial_messages by the native kernels, without its checks. `cuda`: the module with the CUDA kernels that are to
    run, dpt_hpc._C or the tests' emulation of it; None runs the CPU's."""
    message = _Message(taps, graph, activation == "silu", heads, queries is not None, vectors is not None, cuda)
    inputs = (queries, keys, values, vectors, taps.values, envelope, directions, filter_weights, filter_bias)
    x, v = apply(_RadialMessages, *inputs, message)
    return x, v


_INPUTS = ("queries", "keys", "values", "vectors", "taps", "envelope", "directions", "weights", "bias")
"""Inputs of the Functions below, in their order and by the names of csrc/radial_messages.h."""

_TAPS, _ENVELOPE, _DIRECTIONS = (_INPUTS.index(name) for name in ("taps", "envelope", "directions"))


@dataclass(frozen=True)
class _Message:
    """What a call keeps besides its tensors."""

    taps: RadialTaps
    graph: RadiusGraph
    silu: bool
    heads: int
    attention: bool
    oriented: bool
    cuda: Any = None
    scope: Scope | None = field(default_factory=current_scope)

    def wanted(self, ctx: Any) -> tuple[bool, ...]:
        """Which gradients of the saved tensors the running backward has to compute; the last of them are _INPUTS."""
        tensors = ctx.saved_tensors
        constant: set[int] = set()
        if self.scope is not None and self.scope.closed:
            constant = {_ENVELOPE, _DIRECTIONS} | (set() if self.taps.trainable else {_TAPS})
        before = len(tensors) - len(_INPUTS)
        absent = [sum(t is None for t in tensors[:k]) for k in range(len(tensors))]
        return tuple(asked(ctx, k, absent[k]) and k - before not in constant for k in range(len(tensors)))

    def run(self, name: str, inputs: tuple[Tensor | None, ...], **pointers: Tensor | None) -> None:
        """Call a native pass on _INPUTS."""
        given = dict(zip(_INPUTS, inputs, strict=True)) | pointers
        held = {key: t.detach().contiguous() for key, t in given.items() if t is not None}
        values, taps = held["values"], held["taps"]
        sizes = {
            "channels": values.shape[1] // (3 if self.oriented else 1),
            "heads": self.heads,
            "taps_per_edge": taps.shape[1],
            "count": self.taps.count,
            "attention": self.attention,
            "oriented": self.oriented,
            "silu": self.silu,
        }
        if self.cuda is not None:
            radial_messages_cuda.run(self.cuda, name, self.graph, self.taps, sizes, held)
            return
        source = self.graph.edge_index[0].contiguous()
        target_ptr, first = self.graph.target_ptr.contiguous(), self.taps.first.contiguous()
        native = getattr(_C, f"radial_messages_{name}_{'float32' if values.dtype == torch.float32 else 'float64'}")
        native(
            num_atoms=self.graph.num_atoms,
            target_ptr=target_ptr.data_ptr(),
            source=source.data_ptr(),
            **sizes,
            first=first.data_ptr(),
            **{key: t.data_ptr() for key, t in held.items()},
            threads=torch.get_num_threads(),
        )


def _empty_like(tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and w else None
        for t, w in zip(tensors, wanted, strict=True)
    )


def _named(prefix: str, tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    return {prefix + name: tensor for name, tensor in zip(_INPUTS, tensors, strict=True)}


class _RadialMessages(Function):
    """Inputs: _INPUTS -> x (N,C), v (N,3,C) or None."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *tensors, message = inputs
        ctx.save_for_backward(*tensors)
        ctx.message = message
        ctx.set_materialize_grads(False)
        values, vectors = tensors[2], tensors[3]
        x = values.new_empty(values.shape[0], values.shape[1] // (3 if message.oriented else 1))
        v = torch.empty_like(vectors, memory_format=torch.contiguous_format) if message.oriented else None
        message.run("forward", tuple(tensors), out_x=x, out_v=v)
        return x, v

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        wanted = ctx.message.wanted(ctx)
        if not any(wanted) or all(g is None for g in gradients):
            return (None,) * 10
        return *apply(_RadialMessagesBackward, *gradients, *ctx.saved_tensors, ctx.message, wanted), None


class _RadialMessagesBackward(Function):
    """Inputs: grad_x, grad_v, _INPUTS -> the gradients of _INPUTS, None where not wanted."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        grad_x, grad_v, *tensors, message, wanted = inputs
        ctx.save_for_backward(grad_x, grad_v, *tensors)
        ctx.message = message
        ctx.set_materialize_grads(False)
        results = _empty_like(tuple(tensors), wanted)
        message.run("backward", tuple(tensors), grad_x=grad_x, grad_v=grad_v, **_named("out_", results))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        wanted = ctx.message.wanted(ctx)
        if not any(wanted) or all(g is None for g in gradients):
            return (None,) * 13
        results = apply(_RadialMessagesDoubleBackward, *ctx.saved_tensors, *gradients, ctx.message, wanted)
        return *results, None, None


class _RadialMessagesDoubleBackward(Function):
    """Inputs: grad_x, grad_v, _INPUTS, cotangents of the gradients of _INPUTS -> gradients of grad_x, grad_v and
    _INPUTS, None where not wanted."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        tensors, along, message, wanted = inputs[:11], inputs[11:20], inputs[20], inputs[21]
        results = _empty_like(tensors, wanted)
        message.run(
            "double_backward",
            tensors[2:],
            grad_x=tensors[0],
            grad_v=tensors[1],
            **_named("along_", along),
            out_x=results[0],
            out_v=results[1],
            **_named("out_", results[2:]),
        )
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise third_derivative("radial_messages")


def _check_arguments(
    tensors: dict[str, Tensor | None], taps: RadialTaps, graph: RadiusGraph, activation: str, heads: int
) -> None:
    values = tensors["values"]
    assert values is not None
    for one, other in (("queries", "keys"), ("vectors", "directions")):
        if (tensors[one] is None) != (tensors[other] is None):
            raise ValueError(f"radial_messages: {one}, {other}: expected both or neither, got one.")
    attention, oriented = tensors["queries"] is not None, tensors["vectors"] is not None
    copies = 3 if oriented else 1
    width = values.shape[1] if values.ndim == 2 else 0
    if width == 0 or width % copies:
        expected = "(N, 3C) beside vectors" if oriented else "(N, C)"
        raise ValueError(f"radial_messages: values: expected {expected}, got {tuple(values.shape)}.")
    atoms, edges, channels = graph.num_atoms, graph.num_edges, width // copies
    columns = channels * (attention + copies)
    window = taps.values.shape[1] if taps.values.ndim == 2 else 0
    shapes = {
        "values": (atoms, width),
        "taps.values": (edges, max(window, 1)),
        "filter_weights": (taps.count, columns),
        "queries": (atoms, channels),
        "keys": (atoms, channels),
        "vectors": (atoms, 3, channels),
        "directions": (edges, 3),
        "envelope": (edges,),
        "filter_bias": (columns,),
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"radial_messages: {name}: expected shape {shapes[name]}, got {tuple(tensor.shape)}.")
        if tensor.dtype != values.dtype or tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"radial_messages: {name}: expected float32 or float64 as all its tensors, got {tensor.dtype} beside "
                f"{values.dtype}."
            )
        if not tensor.device == values.device == graph.edge_index.device:
            raise ValueError(
                f"radial_messages: {name}: expected the device of values and of the graph, {values.device} and "
                f"{graph.edge_index.device}, got {tensor.device}."
            )
    if tuple(taps.first.shape) != (edges,) or taps.first.dtype != torch.int32 or taps.first.device != values.device:
        raise ValueError(
            f"radial_messages: taps.first: expected ({edges},) int32 on {values.device}, got "
            f"{tuple(taps.first.shape)} {taps.first.dtype} on {taps.first.device}."
        )
    # On a GPU this would wait for it; there the caller is trusted.
    low, high = (int(x) for x in taps.first.aminmax()) if edges and not taps.first.is_cuda else (0, 0)
    if low < 0 or high + window > taps.count:
        raise ValueError(
            f"radial_messages: taps: expected windows within the {taps.count} functions, got first functions {low} to "
            f"{high} and {window} taps."
        )
    if activation not in ("identity", "silu"):
        raise ValueError(f"radial_messages: activation: expected identity or silu, got {activation!r}.")
    if heads < 1 or channels % heads or (heads > 1 and not attention):
        raise ValueError(
            f"radial_messages: heads: expected a divisor of {channels} channels, 1 without queries, got {heads}."
        )

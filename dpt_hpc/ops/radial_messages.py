"""Fused messages with radial filters: checks, autograd, and the calls of the native kernels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.ops.backends import Backend, plain_twins
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
    depend on the number of threads (torch.get_num_threads() are used). Rows of filter_weights are not read where all
    taps are zero. After `inner_derivative` there is no gradient for directions, envelope and taps that are not
    trainable.

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
    raise EnvironmentFault(
        f"radial_messages: tensors are on {values.device}, but this build of dpt_hpc has no kernels for it.\n"
        "Use backend='reference'."
    )


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
        if tensor.device != values.device:
            raise ValueError(
                f"radial_messages: {name}: expected the device of values, {values.device}, got {tensor.device}."
            )
    if tuple(taps.first.shape) != (edges,) or taps.first.dtype != torch.int32 or taps.first.device != values.device:
        raise ValueError(
            f"radial_messages: taps.first: expected ({edges},) int32 on {values.device}, got "
            f"{tuple(taps.first.shape)} {taps.first.dtype} on {taps.first.device}."
        )
    if window > taps.count:
        raise ValueError(f"radial_messages: taps: expected at most count = {taps.count} columns, got {window}.")
    if activation not in ("identity", "silu"):
        raise ValueError(f"radial_messages: activation: expected identity or silu, got {activation!r}.")
    if heads < 1 or channels % heads or (heads > 1 and not attention):
        raise ValueError(
            f"radial_messages: heads: expected a divisor of {channels} channels, 1 without queries, got {heads}."
        )

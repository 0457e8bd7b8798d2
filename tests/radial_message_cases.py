"""Graphs, switches, inputs and derivatives of the radial messages: what the tests on the CPU and in emulation share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from systems import NASTY, batch_of
from torch import Tensor

from dpt_hpc.ops import RadialTaps, RadiusGraph, radial_messages, radius_graph

MIXED = [NASTY["triclinic, smaller than the cutoff"], NASTY["one atom with its own images"], NASTY["isolated atoms"]]
GRAPHS: dict[str, Callable[[], RadiusGraph]] = {
    "mixed batch": lambda: radius_graph(*batch_of(MIXED), 2.4),
    "isolated atom": lambda: radius_graph(*batch_of([NASTY["isolated atoms"], NASTY["primitive fcc"]]), 3.1),
    "one atom with its own images": lambda: radius_graph(*batch_of([NASTY["one atom with its own images"]]), 3.1),
    "no edges": lambda: radius_graph(*batch_of([NASTY["isolated atoms"]]), 3.1),
    "no atoms": lambda: radius_graph(*batch_of([NASTY["no atoms"]]), 3.1),
    "nearest 5, asymmetric": lambda: radius_graph(*batch_of(MIXED), 4.0, max_neighbors=5),
}
COUNT = 9
MODULE = sys.modules["dpt_hpc.ops.radial_messages"]  # the function of the same name hides it

Case = dict[str, Any]
CASES: dict[str, Case] = {
    "equivariant transformer, table": {"attention": True, "oriented": True, "silu": False, "window": 4},
    "equivariant transformer, exact": {"attention": True, "oriented": True, "silu": True, "window": 6, "bias": True},
    "attention alone": {"attention": True, "silu": True, "window": 4, "bias": True},
    "attention without envelope": {"attention": True, "silu": False, "window": 5, "envelope": False},
    "continuous filters": {"silu": True, "window": 7, "bias": True},
    "neighbour embedding, table": {"silu": False, "window": 4},
    "plain sum": {"silu": False, "window": 1, "envelope": False},
    "vectors without attention": {"oriented": True, "silu": False, "window": 9, "bias": True, "envelope": False},
    "vectors without attention, table": {"oriented": True, "silu": True, "window": 4},
}
NAMES = ("values", "taps", "weights", "queries", "keys", "vectors", "directions", "envelope", "bias")


def inputs(
    graph: RadiusGraph, case: Case, channels: int = 4, heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Tensors by NAMES, those that are there; the first columns of the windows; heads."""
    generator = torch.Generator().manual_seed(graph.num_edges)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, e, window = graph.num_atoms, graph.num_edges, case["window"]
    attention, oriented = case.get("attention", False), case.get("oriented", False)
    copies = 3 if oriented else 1
    first = torch.randint(0, COUNT - window + 1, (e,), generator=generator, dtype=torch.int32)
    taps = normal(e, window)
    taps[:, 2:3] = 0  # inside a window, and at its end where there are three
    taps[::3, -1:] = 0
    shapes = {"values": (n, copies * channels), "weights": (COUNT, (attention + copies) * channels)}
    if attention:
        shapes |= {"queries": (n, channels), "keys": (n, channels)}
    if oriented:
        shapes |= {"vectors": (n, 3, channels), "directions": (e, 3)}
    if case.get("envelope", True):
        shapes["envelope"] = (e,)
    if case.get("bias", False):
        shapes["bias"] = ((attention + copies) * channels,)
    tensors = {"taps": taps} | {name: normal(*shape) for name, shape in shapes.items()}
    tensors = {name: tensors[name].to(dtype).requires_grad_() for name in NAMES if name in tensors}
    return tensors, first, heads if attention else 1


def call(
    graph: RadiusGraph, case: Case, first: Tensor, heads: int, cuda: Any = None, **options: Any
) -> Callable[..., Any]:
    """The op as a function of the tensors of `inputs`, by name; gives x, or x and vectors. `cuda`: the module whose
    CUDA kernels are to run."""

    def message(**tensors: Tensor) -> Any:
        function = radial_messages if cuda is None else partial(MODULE.fused, cuda=cuda)
        x, v = function(
            tensors["values"],
            RadialTaps(tensors["taps"], first, COUNT, options.get("trainable", True)),
            tensors["weights"],
            graph,
            queries=tensors.get("queries"),
            keys=tensors.get("keys"),
            vectors=tensors.get("vectors"),
            directions=tensors.get("directions"),
            envelope=tensors.get("envelope"),
            filter_bias=tensors.get("bias"),
            activation="silu" if case["silu"] else "identity",
            heads=heads,
            **({"backend": options["backend"]} if "backend" in options else {}),
        )
        return x if v is None else (x, v)

    return message


def derivatives(
    graph: RadiusGraph, case: Case, tensors: dict[str, Tensor], first: Tensor, heads: int, **options: Any
) -> dict[str, Tensor]:
    """The values, all first derivatives and all second ones, along directions that depend on the shapes alone."""
    generator = torch.Generator().manual_seed(1)

    def direction(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    out = call(graph, case, first, heads, **options)(**tensors)
    out = out if isinstance(out, tuple) else (out,)
    along = [direction(y).requires_grad_() for y in out]
    total = sum((y * a).sum() for y, a in zip(out, along, strict=True))
    slopes = torch.autograd.grad(total, list(tensors.values()), create_graph=True)
    product = sum((g * direction(g)).sum() for g in slopes)
    bends = torch.autograd.grad(product, [*along, *tensors.values()], allow_unused=True, materialize_grads=True)
    names = [f"out {k}" for k in range(len(out))]
    return {
        **{name: y.detach() for name, y in zip(names, out, strict=True)},
        **{f"d {name}": g.detach() for name, g in zip(tensors, slopes, strict=True)},
        **{f"dd {name}": g for name, g in zip([*names, *tensors], bends, strict=True)},
    }


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if value.numel():
            error = (value - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-3)
            assert error <= tolerance, f"{name}: {error:.2e}"

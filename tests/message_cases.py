"""Graphs, inputs and derivatives of messages: what the tests on the CPU, in emulation and on a GPU share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from systems import NASTY, batch_of
from torch import Tensor

from dpt_hpc.ops import RadialBasis, RadiusGraph, cgconv, radius_graph

CUTOFF = 3.1
GAUSSIANS = RadialBasis("gaussian", count=7, start=0.0, spacing=CUTOFF / 6, width=0.4)
SPLINES = RadialBasis("bspline", count=9, start=-1.0, spacing=0.6, width=0.6)
BASES = {"gaussian": GAUSSIANS, "bspline": SPLINES}

MIXED = [NASTY["triclinic, smaller than the cutoff"], NASTY["one atom with its own images"], NASTY["isolated atoms"]]
GRAPHS: dict[str, Callable[[], RadiusGraph]] = {
    "mixed batch": lambda: radius_graph(*batch_of(MIXED), 2.4),
    "isolated atom": lambda: radius_graph(*batch_of([NASTY["isolated atoms"], NASTY["primitive fcc"]]), CUTOFF),
    "one atom with its own images": lambda: radius_graph(*batch_of([NASTY["one atom with its own images"]]), CUTOFF),
    "no edges": lambda: radius_graph(*batch_of([NASTY["isolated atoms"]]), CUTOFF),
    "no atoms": lambda: radius_graph(*batch_of([NASTY["no atoms"]]), CUTOFF),
    "every edge an atom of its own": lambda: RadiusGraph(
        torch.arange(5).expand(2, 5).contiguous(), torch.zeros(5, 3, dtype=torch.int32), torch.arange(6)
    ),
    "nearest 5, asymmetric": lambda: radius_graph(*batch_of(MIXED), 4.0, max_neighbors=5),
}


def inputs(
    graph: RadiusGraph, basis: RadialBasis, channels: int = 3, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(graph.num_edges)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    n = graph.num_atoms
    lengths = 0.4 + torch.rand(graph.num_edges, generator=generator, dtype=torch.float64) * (CUTOFF - 0.3)
    tensors = [normal(n, 2 * channels), normal(n, 2 * channels), lengths, normal(basis.count, 2 * channels)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def derivatives(
    tensors: list[Tensor],
    basis: RadialBasis,
    graph: RadiusGraph,
    message: Callable[..., Tensor] = cgconv,
    **options: str,
) -> dict[str, Tensor]:
    """The value, all first derivatives and all second ones, along directions that depend on the shapes alone."""
    names = ("target_features", "source_features", "edge_lengths", "filter_weights")
    generator = torch.Generator().manual_seed(1)

    def direction(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    y = message(*tensors, basis, graph, **options)
    along = direction(y).requires_grad_()
    first = torch.autograd.grad((y * along).sum(), tensors, create_graph=True)
    product = sum((g * direction(g)).sum() for g in first)
    second = torch.autograd.grad(product, [along, *tensors])
    return {
        "y": y.detach(),
        **{f"d {name}": g.detach() for name, g in zip(names, first, strict=True)},
        **{f"dd {name}": g for name, g in zip(("grad_y", *names), second, strict=True)},
    }


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    for name, value in a.items():
        if value.numel():
            error = (value - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"{name}: {error:.2e}"

"""The native operations on a real GPU: the CPU's results, their derivatives, the same bits always, on any stream.

To add an operation: a line in OPERATIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from message_cases import GAUSSIANS, GRAPHS, SPLINES, inputs
from networks import NETWORKS
from systems import FCC, NASTY, batch_of, random_system, supercell
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from dpt_hpc import _C
from dpt_hpc.models import build_model, predict
from dpt_hpc.ops import (
    Precision,
    RadialTaps,
    RadiusGraph,
    cgconv,
    edge_product,
    gather_aggregate,
    linear,
    radial_messages,
    radius_graph,
    radius_graph_cuda,
)
from dpt_hpc.structure import Batch, Structure

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.has_cuda), reason="needs a GPU and dpt_hpc built with its CUDA kernels"
)

Operation = tuple[Callable[..., Tensor], Callable[[RadiusGraph], list[Tensor]]]
"""A function of a graph and float tensors, and such tensors in float64 on the CPU."""


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def _taps(values: Tensor) -> RadialTaps:
    first = torch.arange(values.shape[0], device=values.device) * 7 % (10 - values.shape[1])
    return RadialTaps(values, first.int(), 9)


def _transformer(graph: RadiusGraph, *tensors: Tensor) -> Tensor:
    """Messages with all their switches on: scalars and vectors in one tensor."""
    values, taps, weights, queries, keys, vectors, directions, envelope, bias = tensors
    x, v = radial_messages(
        values,
        _taps(taps),
        weights,
        graph,
        queries=queries,
        keys=keys,
        vectors=vectors,
        directions=directions,
        envelope=envelope,
        filter_bias=bias,
        activation="silu",
        heads=2,
    )
    assert v is not None
    return torch.cat([x, v.flatten(1)], 1)


def _transformer_inputs(graph: RadiusGraph, channels: int, window: int) -> list[Tensor]:
    atoms, edges = graph.num_atoms, graph.num_edges
    node, columns = (atoms, channels), 4 * channels
    shapes = [(atoms, 3 * channels), (edges, window), (9, columns), node, node, (atoms, 3, channels), (edges, 3)]
    return [_normal(*shape) for shape in [*shapes, (edges,), (columns,)]]


OPERATIONS: dict[str, Operation] = {
    "cgconv, Gaussians": (lambda g, *t: cgconv(*t, GAUSSIANS, g), partial(inputs, basis=GAUSSIANS, channels=4)),
    "cgconv, splines": (lambda g, *t: cgconv(*t, SPLINES, g), partial(inputs, basis=SPLINES, channels=4)),
    "cgconv, 37 channels": (lambda g, *t: cgconv(*t, SPLINES, g, "sum"), partial(inputs, basis=SPLINES, channels=37)),
    "gather_aggregate": (
        lambda g, *t: gather_aggregate(*t, g),
        lambda g: [_normal(g.num_edges, 6), _normal(g.num_atoms, 6)],
    ),
    "edge_product": (
        lambda g, *t: edge_product(*t, g),
        lambda g: [_normal(g.num_atoms, 6), _normal(g.num_atoms, 6)],
    ),
    "radial_messages, all switches": (_transformer, partial(_transformer_inputs, channels=6, window=7)),
    "radial_messages, long heads": (_transformer, partial(_transformer_inputs, channels=70, window=4)),
    "radial_messages, plain sum": (
        lambda g, x, taps, w: radial_messages(x, _taps(taps), w, g)[0],
        lambda g: [_normal(g.num_atoms, 37), _normal(g.num_edges, 4), _normal(9, 37)],
    ),
}

operations = pytest.mark.parametrize("name", OPERATIONS)


def moved(graph: RadiusGraph, device: str) -> RadiusGraph:
    tensors = (graph.edge_index, graph.cell_shifts, graph.target_ptr)
    return RadiusGraph(*(t.to(device) for t in tensors), graph.num_truncated)


def case(
    name: str, graph: RadiusGraph, device: str = "cuda", dtype: torch.dtype = torch.float64
) -> tuple[Callable[..., Tensor], RadiusGraph, list[Tensor]]:
    operation, make = OPERATIONS[name]
    tensors = [t.detach().to(device, dtype).requires_grad_() for t in make(graph)]
    return operation, moved(graph, device), tensors


def derivatives(operation: Callable[..., Tensor], graph: RadiusGraph, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The value, its first derivatives and the second ones, along directions that depend on the shapes alone."""

    def direction(like: Tensor) -> Tensor:
        steps = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
        return torch.cos(steps).reshape(like.shape).to(like.dtype)

    y = operation(graph, *tensors)
    along = direction(y).requires_grad_()
    first = torch.autograd.grad((y * along).sum(), tensors, create_graph=True)
    product = sum((g * direction(g)).sum() for g in first)
    second = torch.autograd.grad(product, [along, *tensors])
    return [t.detach() for t in (y, *first, *second)]


def large_graph() -> RadiusGraph:
    """Rows of all lengths, some of them longer than a block's share."""
    return radius_graph(*batch_of([supercell(FCC, 3.6, 5, rattle=0.3), NASTY["isolated atoms"]]), 6.0, 77)


@pytest.mark.parametrize("cell_list_atoms", [radius_graph_cuda.CELL_LIST_ATOMS, 20, 0])
@pytest.mark.parametrize("max_neighbors", [None, 7])
def test_radius_graph_equals_the_cpu(
    max_neighbors: int | None, cell_list_atoms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(radius_graph_cuda, "CELL_LIST_ATOMS", cell_list_atoms)
    crystals = [supercell(FCC, 3.6, 6, rattle=0.2)]
    for systems in (list(NASTY.values()), [random_system(seed) for seed in range(200)], crystals, []):
        batch = batch_of(systems)
        expected = radius_graph(*batch, 3.5, max_neighbors)
        found = radius_graph(*(t.cuda() for t in batch), 3.5, max_neighbors)
        assert found.edge_index.is_cuda
        assert found.num_truncated == expected.num_truncated
        for field in ("edge_index", "cell_shifts", "target_ptr"):
            assert torch.equal(getattr(found, field).cpu(), getattr(expected, field))
        for mine, theirs in zip(found.by_source, expected.by_source, strict=True):
            assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@operations
def test_equals_the_cpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for make in (*GRAPHS.values(), large_graph):  # some have no edges, or no atoms
        graph = make()
        expected = derivatives(*case(name, graph, "cpu"))
        for mine, theirs in zip(derivatives(*case(name, graph, dtype=dtype)), expected, strict=True):
            assert mine.is_cuda
            if mine.numel():
                error = (mine.cpu() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
                assert error <= tolerance, f"{error:.2e}"


@operations
def test_first_and_second_derivatives(name: str) -> None:
    for make in GRAPHS.values():
        operation, graph, tensors = case(name, make())
        assert gradcheck(partial(operation, graph), tensors, fast_mode=True)
        assert gradgradcheck(partial(operation, graph), tensors, fast_mode=True)


@operations
def test_same_bits_always_and_on_another_stream(name: str) -> None:
    once = derivatives(*case(name, large_graph(), dtype=torch.float32))
    stream = torch.cuda.Stream()
    for context in (torch.cuda.stream(stream), torch.cuda.stream(None)):
        with context:
            again = derivatives(*case(name, large_graph(), dtype=torch.float32))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@operations
def test_second_device(name: str) -> None:
    expected = derivatives(*case(name, large_graph(), dtype=torch.float32))
    found = derivatives(*case(name, large_graph(), "cuda:1", torch.float32))
    assert all(t.device.index == 1 for t in found)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


@operations
def test_in_a_cuda_graph(name: str) -> None:
    """All passes are captured once, and replayed on other numbers."""
    operation, graph, tensors = case(name, GRAPHS["mixed batch"](), dtype=torch.float32)
    _, _, others = case(name, GRAPHS["mixed batch"](), dtype=torch.float32)
    for t in others:
        t.data.mul_(0.8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        derivatives(operation, graph, tensors)  # what is made once per graph, is made before
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = derivatives(operation, graph, tensors)
    for t, other in zip(tensors, others, strict=True):
        t.data.copy_(other.data)
    captured.replay()
    torch.cuda.synchronize()
    expected = derivatives(operation, graph, others)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_and_its_training_gradient(name: str) -> None:
    """Energy, forces, stress and the gradient of a loss on them equal the CPU's."""
    torch.manual_seed(0)
    model = build_model(NETWORKS[name]).double()
    structures = [
        Structure(s.positions, s.cell, s.pbc, torch.full((s.num_atoms,), 29))
        for s in (supercell(FCC, 3.6, 1, rattle=0.1), NASTY["triclinic, smaller than the cutoff"])
    ]
    batch = Batch.from_structures(structures, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        model = model.to(device).train()
        model.zero_grad()
        p = predict(model, batch.to(device))
        assert p.forces is not None
        assert p.stress is not None
        (p.energy.square().sum() + p.forces.square().sum() + p.stress.square().sum()).backward()
        gradients = [q.grad for q in model.parameters() if q.grad is not None]
        results.append([t.detach().cpu() for t in (p.energy, p.forces, p.stress, *gradients)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.parametrize(("precision", "rounding"), [("bf16", 2.0**-8), ("tf32", 2.0**-11)])
def test_narrow_products_are_rounded_once(precision: Precision, rounding: float) -> None:
    x, weight, bias = (_normal(*shape).detach().float().cuda() for shape in ((12, 20), (7, 20), (7,)))
    y, exact = linear(x, weight, bias, precision), functional.linear(x, weight, bias)
    assert y.dtype == torch.float32
    size = functional.linear(x.abs(), weight.abs())
    assert 0 < float(((y - exact).abs() / size).max()) < 2 * rounding

"""gather_aggregate and edge_product: equal to their plain twins, differentiable three times, enough for two models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from systems import NASTY, batch_of, supercell
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dpt_hpc import _C
from dpt_hpc.ops import RadiusGraph, edge_product, gather_aggregate, radius_graph

module = importlib.import_module("dpt_hpc.ops.gather_aggregate")  # the function has its name
CUTOFF = 3.1
MIXED = [NASTY["triclinic, smaller than the cutoff"], NASTY["one atom with its own images"], NASTY["isolated atoms"]]
GRAPHS: dict[str, Callable[[], RadiusGraph]] = {
    "mixed batch": lambda: radius_graph(*batch_of(MIXED), 2.4),
    "isolated atom": lambda: radius_graph(*batch_of([NASTY["isolated atoms"], NASTY["primitive fcc"]]), CUTOFF),
    "one atom with its own images": lambda: radius_graph(*batch_of([NASTY["one atom with its own images"]]), 2.1),
    "no edges": lambda: radius_graph(*batch_of([NASTY["isolated atoms"]]), CUTOFF),
    "no atoms": lambda: radius_graph(*batch_of([NASTY["no atoms"]]), CUTOFF),
    "nearest 5, asymmetric": lambda: radius_graph(*batch_of(MIXED), 4.0, max_neighbors=5),
}
LEVELS = [getattr(_C, level) for level in ("baseline", "v3", "v4") if hasattr(_C, level)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gather_inputs(
    graph: RadiusGraph, channels: int, shared: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    return (
        normal(graph.num_edges, 1 if shared else channels, dtype=dtype),
        normal(graph.num_atoms, channels, seed=1, dtype=dtype),
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_first_and_second_derivatives(name: str, shared: bool) -> None:
    graph = GRAPHS[name]()
    inputs = gather_inputs(graph, 2, shared)
    ends = normal(graph.num_atoms, 2, seed=2), normal(graph.num_atoms, 2, seed=3)
    for function, tensors in (
        (partial(gather_aggregate, graph=graph), inputs),
        (partial(edge_product, graph=graph, reduce=shared), ends),
    ):
        assert gradcheck(function, tensors)
        assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("shared", [False, True])
def test_a_third_derivative(shared: bool) -> None:
    graph = GRAPHS["nearest 5, asymmetric"]()

    def slope(weights: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        y = gather_aggregate(weights, features, graph).tanh().square().sum()
        return torch.autograd.grad(y, (weights, features), create_graph=True)

    assert gradgradcheck(slope, gather_inputs(graph, 2, shared))


def everything(
    graph: RadiusGraph, channels: int, shared: bool, dtype: torch.dtype, backend: str = "native"
) -> list[Tensor]:
    """Values, first and second derivatives of both."""
    w, x = gather_inputs(graph, channels, shared, dtype)
    y = gather_aggregate(w, x, graph, backend=backend)
    first = torch.autograd.grad((y * y.detach()).sum(), (w, x), create_graph=True)
    second = torch.autograd.grad(sum((g * g.detach()).sum() for g in first), (w, x))
    p = edge_product(x, y.detach(), graph, reduce=shared, backend=backend)
    product = torch.autograd.grad((p * w).sum(), (w, x))
    return [t.detach() for t in (y, *first, *second, p, *product)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("channels", [1, 37, 64, 130])
def test_equals_the_plain_twin(channels: int, shared: bool) -> None:
    for make in GRAPHS.values():
        graph = make()
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
            native = everything(graph, channels, shared, dtype)
            twin = everything(graph, channels, shared, dtype, backend="reference")
            for value, expected in zip(native, twin, strict=True):
                assert value.shape == expected.shape
                torch.testing.assert_close(
                    value, expected, rtol=0, atol=tolerance * (float(expected.abs().amax()) if value.numel() else 0)
                )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_for_any_number_of_threads_and_any_processor(
    dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = radius_graph(*batch_of([supercell([[0, 0, 0], [0.5, 0.5, 0.5]], 3.0, 3, rattle=0.3)]), 5.0, 17)
    runs = []
    for threads in (1, 1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        runs.append(everything(graph, 77, shared, dtype))
    for level in LEVELS:
        monkeypatch.setattr(module, "_C", level)
        runs.append(everything(graph, 77, shared, dtype))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_tensors_that_are_not_contiguous() -> None:
    graph = GRAPHS["mixed batch"]()
    w, x = normal(3, graph.num_edges).T, normal(3, graph.num_atoms).T
    torch.testing.assert_close(gather_aggregate(w, x, graph), gather_aggregate(w, x, graph, backend="reference"))
    torch.testing.assert_close(edge_product(x, x, graph), edge_product(x, x, graph, backend="reference"))


def test_an_infinity_is_not_hidden() -> None:
    graph = GRAPHS["mixed batch"]()
    w, x = gather_inputs(graph, 3, False)
    with torch.no_grad():
        w[0], x[int(graph.edge_index[0, 0])] = 0.0, torch.inf
    y = gather_aggregate(w, x, graph)
    assert y[graph.edge_index[1, 0]].isnan().all()


def test_no_gradient_is_computed_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["mixed batch"]()
    w, x = gather_inputs(graph, 3, False)
    y = gather_aggregate(w.detach(), x, graph)
    monkeypatch.delattr(module, "_product")
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 2), torch.ones(2, 2)), ValueError, r"gather_aggregate: weights: expected shape \(2, 2\)"),
        ((torch.ones(2, 3), torch.ones(2, 2)), ValueError, r"gather_aggregate: weights: expected shape \(2, 2\)"),
        ((torch.ones(2, 2), torch.ones(2)), ValueError, r"features: expected shape \(2, F\), got \(2,\)"),
        ((torch.ones(2, 2), torch.ones(2, 2).double()), TypeError, "weights: expected float32 or float64"),
        ((torch.ones(2, 2).int(), torch.ones(2, 2).int()), TypeError, "features: expected float32 or float64"),
        ((torch.ones(2, 2, device="meta"), torch.ones(2, 2)), ValueError, "weights: expected the device of features"),
    ],
)
def test_errors(arguments: tuple[Tensor, Tensor], error: type[Exception], message: str) -> None:
    graph = RadiusGraph(torch.tensor([[1, 0], [0, 1]]), torch.zeros(2, 3).int(), torch.tensor([0, 1, 2]))
    with pytest.raises(error, match=message):
        gather_aggregate(*arguments, graph)


def test_errors_of_the_product_and_of_the_backend() -> None:
    graph = RadiusGraph(torch.tensor([[1, 0], [0, 1]]), torch.zeros(2, 3).int(), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"edge_product: sources: expected shape \(2, 3\), got \(2, 4\)"):
        edge_product(torch.ones(2, 3), torch.ones(2, 4), graph)
    with pytest.raises(ValueError, match="edge_product: backend: expected native"):
        edge_product(torch.ones(2, 3), torch.ones(2, 3), graph, backend="none")


def test_compiled_code_breaks_off_but_is_right() -> None:
    graph = GRAPHS["mixed batch"]()
    w, x = gather_inputs(graph, 3, False)

    def function(weights: Tensor, features: Tensor) -> Tensor:
        return gather_aggregate(weights * 2, features, graph) + 1

    compiled = torch.compile(function, backend="eager")
    torch.testing.assert_close(compiled(w, x), function(w, x))


# Two published models, written with the pair.


def schnet_energy(positions: Tensor, graph: RadiusGraph, parameters: list[Tensor]) -> Tensor:
    """Continuous-filter convolutions: x_i + sum_j x_j * W(d_ij)."""
    widths, first, second, x = parameters
    source, target = graph.edge_index
    lengths = (positions[source] - positions[target] + offsets(graph)).norm(dim=1, keepdim=True)
    filters = torch.tanh(torch.exp(-(lengths - 2).square() * widths) @ first) @ second
    for _ in range(2):
        x = x + torch.tanh(gather_aggregate(filters * (lengths - CUTOFF).square(), x, graph))
    return x.sum()


def painn_energy(positions: Tensor, graph: RadiusGraph, parameters: list[Tensor]) -> Tensor:
    """Scalar and vector messages: v_i = sum_j ( v_j * W1_e + s_j * W2_e rhat_e )."""
    widths, first, second, s = parameters
    source, target = graph.edge_index
    vectors = positions[source] - positions[target] + offsets(graph)
    lengths = vectors.norm(dim=1, keepdim=True)
    envelope = (lengths - CUTOFF).square()
    w0 = torch.exp(-(lengths - 2).square() * widths) @ first * envelope
    w1, w2 = w0.tanh() @ second * envelope, w0.sin() @ second.T * envelope
    v = s.new_zeros(3, *s.shape)
    for _ in range(2):
        carried = [gather_aggregate(w1, component, graph) for component in v]
        pushed = [gather_aggregate(w2 * direction[:, None], s, graph) for direction in (vectors / lengths).T]
        v = v + torch.stack(carried) + torch.stack(pushed)
        s = s + gather_aggregate(w0, s, graph) + v.square().sum(0)
    return s.tanh().sum()


def offsets(graph: RadiusGraph) -> Tensor:
    return graph.cell_shifts.double() @ NASTY["triclinic, smaller than the cutoff"].cell


@pytest.mark.parametrize("energy", [schnet_energy, painn_energy])
def test_forces_of_two_models_are_finite_differences(
    energy: Callable[[Tensor, RadiusGraph, list[Tensor]], Tensor],
) -> None:
    system = NASTY["triclinic, smaller than the cutoff"]
    graph = radius_graph(*batch_of([system]), CUTOFF)
    positions = system.positions.clone().requires_grad_()
    parameters = [
        (normal(5, seed=3) * 0.3).detach().requires_grad_(),
        (normal(5, 4, seed=4) * 0.3).detach().requires_grad_(),
        (normal(4, 4, seed=5) * 0.3).detach().requires_grad_(),
        normal(3, 4, seed=6),
    ]
    function = partial(energy, graph=graph, parameters=parameters)
    assert gradcheck(function, (positions,))
    assert gradgradcheck(function, (positions,))
    (gradient,) = torch.autograd.grad(function(positions), positions, create_graph=True)
    loss = gradient.square().sum()
    for p, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        step = 1e-6 * normal(*p.shape, seed=9).detach()
        losses = []
        for sign in (1, -1):
            moved = [q + sign * step if q is p else q for q in parameters]
            (g,) = torch.autograd.grad(energy(positions, graph, moved), positions)
            losses.append(g.square().sum())
        difference = float(losses[0] - losses[1]) / 2
        assert float((slope * step).sum()) == pytest.approx(difference, rel=1e-6)

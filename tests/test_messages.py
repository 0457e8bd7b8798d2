"""cgconv: equal to its plain twin, differentiable twice, the same bits always, and clear about what it refuses."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from message_cases import BASES, GAUSSIANS, GRAPHS, SPLINES, assert_close, derivatives, inputs
from systems import NASTY, batch_of, supercell
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dpt_hpc import _C
from dpt_hpc.ops import RadialBasis, RadiusGraph, cgconv, inner_derivative, messages, radius_graph


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", GRAPHS)
def test_first_and_second_derivatives(name: str, kind: str) -> None:
    graph, basis = GRAPHS[name](), BASES[kind]

    def mean(*tensors: Tensor) -> Tensor:
        return cgconv(*tensors, basis, graph)

    tensors = inputs(graph, basis)
    assert gradcheck(mean, tensors)
    assert gradgradcheck(mean, tensors)


def test_derivatives_at_knots_and_outside_the_table() -> None:
    graph = radius_graph(*batch_of([NASTY["one atom with its own images"]]), 3.0)
    tensors = inputs(graph, SPLINES)
    knots = SPLINES.start + SPLINES.spacing * torch.arange(graph.num_edges, dtype=torch.float64)
    assert knots[-1] > SPLINES.start + SPLINES.spacing * (SPLINES.count + 2)
    tensors[2] = (knots - 2 * SPLINES.spacing).requires_grad_()

    def total(*arguments: Tensor) -> Tensor:
        return cgconv(*arguments, SPLINES, graph, "sum")

    assert gradcheck(total, tensors)
    # The third derivative jumps at a knot: finite differences of the second are right to about their step.
    assert gradgradcheck(total, tensors, atol=2e-4)
    assert_close(derivatives(tensors, SPLINES, graph), derivatives(tensors, SPLINES, graph, backend="reference"), 1e-12)


@pytest.mark.parametrize("kind", BASES)
def test_derivatives_of_saturated_gates(kind: str) -> None:
    graph = GRAPHS["mixed batch"]()
    tensors = inputs(graph, BASES[kind], scale=15.0)
    assert gradcheck(lambda *t: cgconv(*t, BASES[kind], graph), tensors)
    assert gradgradcheck(lambda *t: cgconv(*t, BASES[kind], graph), tensors)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", GRAPHS)
def test_equals_the_plain_twin(name: str, kind: str, aggregation: str) -> None:
    graph, basis = GRAPHS[name](), BASES[kind]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        # 37 channels: neither a multiple of a vector nor of 16.
        tensors = inputs(graph, basis, channels=37, dtype=dtype)
        native = derivatives(tensors, basis, graph, aggregation=aggregation)
        twin = derivatives(tensors, basis, graph, aggregation=aggregation, backend="reference")
        assert_close(native, twin, tolerance)


def test_equals_the_plain_twin_at_the_papers_sizes() -> None:
    graph = radius_graph(*batch_of([supercell([[0, 0, 0], [0.5, 0.5, 0.5]], 3.0, 3, rattle=0.1)]), 6.0)
    basis = RadialBasis("gaussian", count=50, start=0.0, spacing=8 / 49, width=0.4)
    tensors = inputs(graph, basis, channels=100, scale=0.3)
    with torch.no_grad():
        tensors[2].uniform_(1.5, 8.0)
    exact = derivatives(tensors, basis, graph, backend="reference")
    assert_close(derivatives(tensors, basis, graph), exact, 1e-12)
    single = [t.detach().float().requires_grad_() for t in tensors]
    assert_close(derivatives(single, basis, graph), exact, 5e-6)


LEVELS = [level for level in ("baseline", "v3", "v4") if hasattr(_C, level)]


def large_graph() -> RadiusGraph:
    """More edges than a chunk, rows of all lengths, two structures."""
    systems = [supercell([[0, 0, 0], [0.5, 0.5, 0.5]], 3.0, 6, rattle=0.3), NASTY["one atom with its own images"]]
    return radius_graph(*batch_of(systems), 7.0, max_neighbors=77)


@pytest.mark.parametrize("kind", BASES)
def test_same_bits_for_any_number_of_threads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, basis = large_graph(), BASES[kind]
    assert graph.num_edges > 8 * 4096
    for dtype in (torch.float32, torch.float64):
        tensors = inputs(graph, basis, channels=19, dtype=dtype)
        runs = []
        for threads in (1, 1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            runs.append(derivatives(tensors, basis, graph))
        for other in runs[1:]:
            for name, value in runs[0].items():
                assert torch.equal(value, other[name]), name
        monkeypatch.undo()
        assert_close(
            runs[0],
            derivatives(tensors, basis, graph, backend="reference"),
            1e-12 if dtype == torch.float64 else 2e-5,
        )


@pytest.mark.parametrize("kind", BASES)
def test_processor_levels_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, basis = GRAPHS["mixed batch"](), BASES[kind]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        tensors = inputs(graph, basis, channels=21, dtype=dtype)
        twin = derivatives(tensors, basis, graph, backend="reference")
        for level in LEVELS:
            monkeypatch.setattr(messages, "_C", getattr(_C, level))
            assert_close(derivatives(tensors, basis, graph), twin, tolerance)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1.2e-6), (torch.float64, 2e-15)])
def test_activations_keep_their_relative_accuracy(
    level: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One edge with no filter: y and its derivatives are those of sigmoid(g) softplus(s), channel by channel."""
    monkeypatch.setattr(messages, "_C", getattr(_C, level))
    axis = torch.cat(
        [torch.linspace(-85, 85, 341), torch.linspace(-1e-3, 1e-3, 41), torch.tensor([0.0, -0.0])]
    ).double()
    g, s = (t.flatten().to(dtype) for t in torch.meshgrid(axis, axis, indexing="ij"))
    graph = RadiusGraph(
        torch.tensor([[1], [0]]), torch.zeros(1, 3, dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int64)
    )
    features = torch.zeros(2, 2 * len(g), dtype=dtype)
    features[0] = torch.cat([g, s])
    features.requires_grad_()
    lengths, table = torch.ones(1, dtype=dtype), torch.zeros(4, 2 * len(g), dtype=dtype)
    basis = RadialBasis("bspline", 4, 0.0, 1.0, 1.0)
    y = cgconv(features, torch.zeros_like(features), lengths, table, basis, graph)
    first = torch.autograd.grad(y.sum(), features, create_graph=True)[0][0].chunk(2)
    second = [torch.autograd.grad(part.sum(), features, retain_graph=True)[0][0] for part in first]

    # In float64, in the forms that do not cancel.
    g, s = g.double(), s.double()
    sigmoid, softplus, slope = torch.sigmoid(g), s.clamp(min=0) + torch.log1p(torch.exp(-s.abs())), torch.sigmoid(s)
    sigmoid1, slope1 = sigmoid * torch.sigmoid(-g), slope * torch.sigmoid(-s)
    sigmoid2 = -sigmoid1 * torch.tanh(g / 2)
    expected = {
        "m": (y[0], sigmoid * softplus),
        "m_g": (first[0], sigmoid1 * softplus),
        "m_s": (first[1], sigmoid * slope),
        "m_gg": (second[0][: len(g)], sigmoid2 * softplus),
        "m_gs": (second[0][len(g) :], sigmoid1 * slope),
        "m_sg": (second[1][: len(g)], sigmoid1 * slope),
        "m_ss": (second[1][len(g) :], sigmoid * slope1),
    }
    for name, (value, exact) in expected.items():
        normal = exact.abs() > 1e-30
        scale = sigmoid1 * softplus if name == "m_gg" else exact  # m_gg is zero at g = 0
        error = ((value.double() - exact) / scale)[normal].abs().max()
        assert error < tolerance, f"{name}: {error:.2e}"
        assert (value.double() - exact)[~normal].abs().max() < 1e-30


def test_extreme_and_broken_numbers() -> None:
    graph = GRAPHS["one atom with its own images"]()
    for kind, value in itertools.product(BASES, (1e30, -1e30, torch.inf, -torch.inf, torch.nan)):
        # A spline that reaches no edge does not poison the message; in the twin it does, as 0 * inf.
        for which in (0, 1) if abs(value) == 1e30 or kind == "bspline" else (0, 1, 3):
            tensors = [t.detach().float() for t in inputs(graph, BASES[kind])]
            tensors[which][0] = value
            native = cgconv(*tensors, BASES[kind], graph)
            twin = cgconv(*tensors, BASES[kind], graph, backend="reference")
            assert torch.equal(native.isnan(), twin.isnan())
            finite = ~twin.isnan()
            torch.testing.assert_close(native[finite], twin[finite])
        tensors = [t.detach().float() for t in inputs(graph, BASES[kind])]
        tensors[2][0] = value
        if value != value:
            assert cgconv(*tensors, BASES[kind], graph).isnan().all()
        else:
            assert cgconv(*tensors, BASES[kind], graph).isfinite().all()  # no basis function reaches that far


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["mixed batch"]()
    a, b, lengths, table = inputs(graph, SPLINES)
    computed: list[set[str]] = []
    run = messages._Message.run

    def record(self: messages._Message, name: str, tensors: tuple[Tensor, ...], **pointers: Tensor | None) -> None:
        computed.append({k for k, v in pointers.items() if k.startswith("out") and v is not None})
        run(self, name, tensors, **pointers)

    monkeypatch.setattr(messages._Message, "run", record)
    # As in a network: none of the inputs is a leaf.
    y = cgconv(a * 1, b * 1, lengths * 1, table * 1, SPLINES, graph)
    (slope,) = torch.autograd.grad(y.sum(), lengths, create_graph=True)
    slope.square().sum().backward(inputs=[a, table])
    assert computed[1] == {"out_lengths"}
    assert computed[2] == {"out_a", "out_table"}
    fixed = cgconv(a, b, lengths.detach(), table, SPLINES, graph)
    fixed.sum().backward()
    assert computed[-1] == {"out_a", "out_b", "out_table"}


def test_skipping_changes_nothing() -> None:
    """Gradients of a force-like loss, through leaves (all computed) and through a network (some skipped)."""
    graph = GRAPHS["nearest 5, asymmetric"]()
    results = []
    for backend, once in itertools.product(("native", "reference"), (True, False)):
        tensors = inputs(graph, GAUSSIANS)
        inner = tensors if once else [t * 1 for t in tensors]
        y = cgconv(*inner, GAUSSIANS, graph, backend=backend)
        (slope,) = torch.autograd.grad(y.square().sum(), tensors[2], create_graph=True)
        (y.sum() + slope.square().sum()).backward()
        results.append({str(k): t.grad for k, t in enumerate(tensors)})
    for other in results[1:]:
        assert_close(results[0], other, 1e-12)


def test_after_the_inner_derivative_lengths_are_constants() -> None:
    graph = GRAPHS["nearest 5, asymmetric"]()
    gradients = []
    for scope in (contextlib.nullcontext(), inner_derivative()):
        tensors = inputs(graph, GAUSSIANS)
        with scope:
            y = cgconv(*tensors, GAUSSIANS, graph)
            (slope,) = torch.autograd.grad(y.square().sum(), tensors[2], create_graph=True)
        (y.sum() + slope.square().sum()).backward()
        gradients.append([t.grad for t in tensors])
    for k in (0, 1, 3):
        assert torch.equal(gradients[0][k], gradients[1][k])
    assert gradients[0][2] is not None
    assert gradients[1][2] is None


def test_third_derivative_is_refused() -> None:
    graph = GRAPHS["mixed batch"]()
    tensors = inputs(graph, SPLINES)
    y = cgconv(*tensors, SPLINES, graph)
    (first,) = torch.autograd.grad(y.sum(), tensors[2], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), tensors[2], create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.sum(), tensors[2])


def test_without_gradients_and_under_compile() -> None:
    graph = GRAPHS["mixed batch"]()
    tensors = inputs(graph, SPLINES)
    with torch.no_grad():
        y = cgconv(*tensors, SPLINES, graph)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(cgconv(*tensors, SPLINES, graph), y)

    @torch.compile(backend="eager")
    def doubled(*arguments: Tensor) -> Tensor:  # cgconv breaks the graph, and works
        return 2 * cgconv(*arguments, SPLINES, graph)

    assert torch.equal(doubled(*tensors), 2 * y)


def test_inputs_in_any_memory_layout() -> None:
    graph = GRAPHS["mixed batch"]()
    tensors = inputs(graph, SPLINES)
    strided = [
        t.detach().t().contiguous().t() if t.ndim == 2 else t.detach()[:, None].expand(-1, 2)[:, 0] for t in tensors
    ]
    strided = [t.requires_grad_() for t in strided]
    a, b = derivatives(tensors, SPLINES, graph), derivatives(strided, SPLINES, graph)
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_bad_arguments() -> None:
    graph = GRAPHS["mixed batch"]()
    a, b, lengths, table = (t.detach() for t in inputs(graph, SPLINES))

    def refused(error: type[Exception], match: str, *tensors: Tensor, **options: str) -> None:
        with pytest.raises(error, match=match):
            cgconv(*tensors, SPLINES, graph, **options)

    refused(ValueError, r"target_features: expected \(N, 2F\)", a[:, :5], b, lengths, table)
    refused(ValueError, r"source_features: expected shape \(6, 6\), got \(5, 6\)", a, b[:5], lengths, table)
    refused(ValueError, "edge_lengths: expected shape", a, b, lengths[1:], table)
    refused(ValueError, "filter_weights: expected shape", a, b, lengths, table[1:])
    refused(TypeError, "source_features: expected float32 or float64", a, b.float(), lengths, table)
    refused(TypeError, "float16", a.half(), b.half(), lengths.half(), table.half())
    refused(ValueError, "device", a, b.to("meta"), lengths, table)
    with pytest.raises(ValueError, match="device of target_features and of the graph, cpu and meta"):
        cgconv(a, b, lengths, table, SPLINES, replace(graph, edge_index=graph.edge_index.to("meta")))
    refused(ValueError, "aggregation: expected mean or sum", a, b, lengths, table, aggregation="max")
    refused(ValueError, "backend: expected native, reference, pyg, got 'cuda'", a, b, lengths, table, backend="cuda")
    with pytest.raises(ValueError, match="kind: expected gaussian or bspline"):
        RadialBasis("fourier", 8, 0.0, 1.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count: expected at least 4"):
        RadialBasis("gaussian", 3, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="spacing: expected a positive length"):
        RadialBasis("gaussian", 8, 0.0, 0.0, 1.0)

"""radial_messages: equal to its plain twin for every switch, differentiable twice, the same bits always."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from radial_message_cases import CASES, COUNT, GRAPHS, MODULE, Case, assert_close, call, derivatives, inputs
from systems import batch_of, supercell
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dpt_hpc import _C
from dpt_hpc.ops import (
    RadialBasis,
    RadialTaps,
    expnorm_taps,
    inner_derivative,
    radial_messages,
    radius_graph,
    spline_taps,
)

LEVELS = [level for level in ("baseline", "v3", "v4") if hasattr(_C, level)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GRAPHS)
def test_first_and_second_derivatives(name: str, case: str) -> None:
    graph = GRAPHS[name]()
    tensors, first, heads = inputs(graph, CASES[case], channels=2)
    message = call(graph, CASES[case], first, heads)

    def positional(*values: Tensor) -> Any:
        return message(**dict(zip(tensors, values, strict=True)))

    # In one random direction: all entries of all tensors, at the cost of one.
    assert gradcheck(positional, list(tensors.values()), fast_mode=True)
    assert gradgradcheck(positional, list(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("case", ["equivariant transformer, table", "equivariant transformer, exact"])
def test_derivatives_entry_by_entry(case: str) -> None:
    graph = GRAPHS["one atom with its own images"]()
    tensors, first, heads = inputs(graph, CASES[case], channels=2)
    message = call(graph, CASES[case], first, heads)

    def positional(*values: Tensor) -> Any:
        return message(**dict(zip(tensors, values, strict=True)))

    assert gradcheck(positional, list(tensors.values()))
    assert gradgradcheck(positional, list(tensors.values()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GRAPHS)
def test_equals_the_plain_twin(name: str, case: str) -> None:
    graph = GRAPHS[name]()
    # Heads of 1, 16, 19 channels: padding, a whole vector, several vectors and a rest.
    for (channels, heads), (dtype, tolerance) in itertools.product(
        ((3, 3), (32, 2), (38, 2)), ((torch.float64, 1e-12), (torch.float32, 2e-5))
    ):
        arguments = inputs(graph, CASES[case], channels, heads, dtype)
        native = derivatives(graph, CASES[case], *arguments)
        twin = derivatives(graph, CASES[case], *arguments, backend="reference")
        assert_close(native, twin, tolerance)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES)
def test_processor_levels_agree(case: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["mixed batch"]()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        arguments = inputs(graph, CASES[case], 21, 3, dtype)
        twin = derivatives(graph, CASES[case], *arguments, backend="reference")
        monkeypatch.setattr(MODULE, "_C", getattr(_C, level))
        assert_close(derivatives(graph, CASES[case], *arguments), twin, tolerance)


@pytest.mark.parametrize("case", ["equivariant transformer, table", "equivariant transformer, exact"])
def test_same_bits_for_any_number_of_threads(case: str) -> None:
    """Enough edges for several chunks of the table's sums."""
    graph = radius_graph(*batch_of([supercell([[0, 0, 0], [0.5, 0.5, 0.5]], 3.0, 4, rattle=0.1)] * 2), 6.0)
    assert graph.num_edges > 3 * 4096
    arguments = inputs(graph, CASES[case], 16, 2, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            results.append(derivatives(graph, CASES[case], *arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@pytest.mark.parametrize("trainable", [True, False])
def test_the_papers_sizes_with_the_windows_of_lengths(trainable: bool) -> None:
    graph = radius_graph(*batch_of([supercell([[0, 0, 0], [0.5, 0.5, 0.5]], 3.0, 2, rattle=0.1)]), 5.0)
    generator = torch.Generator().manual_seed(0)
    lengths = 1.5 + 6.5 * torch.rand(graph.num_edges, generator=generator)
    means, betas = torch.linspace(3e-4, 1, 50), torch.full((50,), 625.0)
    exact = expnorm_taps(lengths, means.requires_grad_(trainable), betas, 0.625)
    assert exact.trainable == trainable
    table = spline_taps(lengths, RadialBasis("bspline", 300, -0.1, 8.2 / 296, 1.0))
    case = CASES["equivariant transformer, exact"]
    for taps in (exact, table):
        tensors, _, heads = inputs(graph, case, 128, 8, torch.float32)
        weights = 0.3 * torch.randn(taps.count, 4 * 128, generator=generator)
        options: Case = {name: tensors[name] for name in ("queries", "keys", "vectors", "directions", "envelope")}
        options |= {"filter_bias": tensors["bias"], "activation": "silu", "heads": heads}
        native = radial_messages(tensors["values"], taps, weights, graph, **options)
        twin = radial_messages(tensors["values"], taps, weights, graph, **options, backend="reference")
        for a, b in zip(native, twin, strict=True):
            assert a is not None
            assert b is not None
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_windows_of_lengths() -> None:
    """Taps in their columns are the functions, beyond their windows exactly zero; whatever training made of them."""
    generator = torch.Generator().manual_seed(0)
    lengths = 9 * torch.rand(60, generator=generator, dtype=torch.float64)
    basis = RadialBasis("bspline", 20, 0.3, 0.37, 1.0)
    taps = spline_taps(lengths.requires_grad_(), basis)
    torch.testing.assert_close(taps.dense(), basis(lengths))
    assert gradcheck(lambda d: spline_taps(d, basis).values, lengths)
    assert gradgradcheck(lambda d: spline_taps(d, basis).values, lengths, atol=1e-4)
    means = torch.linspace(3e-4, 1, 30, dtype=torch.float64)
    betas = torch.full((30,), 225.0, dtype=torch.float64)
    shuffled = torch.randperm(30, generator=generator)
    wide = betas.clone()
    wide[3], wide[7] = 0.01, -0.5
    envelope = torch.rand(60, generator=generator, dtype=torch.float64).requires_grad_()
    for m, b, most in ((means, betas, 26), (means[shuffled], betas, 30), (means, wide, 30)):
        m, b = m.clone().requires_grad_(), b.clone().requires_grad_()
        taps = expnorm_taps(lengths, m, b, 0.625, envelope)
        assert taps.trainable
        assert taps.values.shape[1] <= most
        assert int(taps.first.min()) >= 0
        assert int(taps.first.max()) + taps.values.shape[1] <= 30
        functions = envelope[:, None] * torch.exp(-b * (torch.exp(-0.625 * lengths)[:, None] - m) ** 2)
        torch.testing.assert_close(taps.dense(), functions, atol=1e-16, rtol=1e-14)
        assert (taps.values == 0).any()

        def values(*arguments: Tensor) -> Tensor:
            d, m, b, f = arguments
            return expnorm_taps(d, m, b, 0.625, f).values

        assert gradcheck(values, (lengths, m, b, envelope), fast_mode=True)
        assert gradgradcheck(values, (lengths, m, b, envelope), fast_mode=True)
    empty = expnorm_taps(lengths[:0], means, betas, 0.625)
    assert empty.values.shape == (0, 1)
    with pytest.raises(ValueError, match="means, betas: expected"):
        expnorm_taps(lengths, means, betas[1:], 0.625)
    with pytest.raises(ValueError, match="expected B-splines"):
        spline_taps(lengths, replace(basis, kind="gaussian"))


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, case = GRAPHS["mixed batch"](), CASES["equivariant transformer, exact"]
    tensors, first, heads = inputs(graph, case)
    computed: list[set[str]] = []
    run = MODULE._Message.run

    def record(self: Any, name: str, given: Any, **pointers: Tensor | None) -> None:
        computed.append({k for k, v in pointers.items() if k.startswith("out") and v is not None})
        run(self, name, given, **pointers)

    monkeypatch.setattr(MODULE._Message, "run", record)
    # As in a network: none of the inputs is a leaf.
    x, v = call(graph, case, first, heads)(**{name: t * 1 for name, t in tensors.items()})
    geometry = [tensors["taps"], tensors["directions"]]
    slopes = torch.autograd.grad(x.sum() + v.square().sum(), geometry, create_graph=True)
    sum(s.square().sum() for s in slopes).backward(inputs=[tensors["values"], tensors["weights"]])
    assert computed[1] == {"out_taps", "out_directions"}
    assert computed[2] == {"out_v", "out_values", "out_weights"}
    assert {"out_values", "out_weights"} == computed[3]


@pytest.mark.parametrize("trainable", [True, False])
def test_after_the_inner_derivative_geometry_is_constant(trainable: bool) -> None:
    graph, case = GRAPHS["nearest 5, asymmetric"](), CASES["equivariant transformer, exact"]
    gradients = []
    for scope in (contextlib.nullcontext(), inner_derivative()):
        tensors, first, heads = inputs(graph, case)
        with scope:
            x, v = call(graph, case, first, heads, trainable=trainable)(**tensors)
            geometry = [tensors["taps"], tensors["directions"], tensors["envelope"]]
            slopes = torch.autograd.grad(x.square().sum() + v.square().sum(), geometry, create_graph=True)
        (x.sum() + sum(s.square().sum() for s in slopes)).backward()
        gradients.append({name: t.grad for name, t in tensors.items()})
    skipped = {"directions", "envelope"} | (set() if trainable else {"taps"})
    assert {name for name, g in gradients[1].items() if g is None} == skipped
    for name in set(gradients[0]) - skipped:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


def test_each_gradient_alone_and_one_output_alone() -> None:
    """Every gradient is the same whether or not the others are computed; either output may be unused."""
    graph, case = GRAPHS["nearest 5, asymmetric"](), CASES["equivariant transformer, exact"]
    tensors, first, heads = inputs(graph, case)
    for which in (0, 1):

        def slope_of(name: str, backend: str, all_of_them: bool, which: int = which) -> Tensor:
            given = {k: t if all_of_them or k == name else t.detach() for k, t in tensors.items()}
            y = call(graph, case, first, heads, backend=backend)(**given)[which].square().sum()
            return torch.autograd.grad(y, given[name], materialize_grads=True, allow_unused=True)[0]

        for name in tensors:
            alone = slope_of(name, "native", False)
            assert torch.equal(alone, slope_of(name, "native", True)), name
            torch.testing.assert_close(alone, slope_of(name, "reference", True), rtol=1e-10, atol=1e-10)


def test_large_scores_do_not_overflow() -> None:
    graph, case = GRAPHS["mixed batch"](), CASES["equivariant transformer, exact"]
    for dtype in (torch.float32, torch.float64):
        tensors, first, heads = inputs(graph, case, dtype=dtype)
        with torch.no_grad():
            tensors["queries"] *= 1e4
            tensors["bias"] *= 1e3
        native = derivatives(graph, case, tensors, first, heads)
        assert all(t.isfinite().all() for t in native.values())
        assert_close(native, derivatives(graph, case, tensors, first, heads, backend="reference"), 1e-4)


@pytest.mark.parametrize("case", ["equivariant transformer, table", "equivariant transformer, exact"])
def test_extreme_and_broken_numbers(case: str) -> None:
    """They reach the messages and, as numbers that are not finite, the first derivatives, as in the twin."""
    graph = GRAPHS["mixed batch"]()
    names = ("keys", "queries", "values", "taps", "vectors", "directions", "envelope", "bias")
    for dtype, value in itertools.product((torch.float64, torch.float32), (-torch.inf, torch.inf, torch.nan, 1e25)):
        for name in names if value != 1e25 else ("keys", "taps", "bias"):
            tensors, first, heads = inputs(graph, CASES[case], dtype=dtype)
            if name not in tensors:
                continue
            with torch.no_grad():
                tensors[name].view(-1)[0] = value
            results = []
            for backend in ("native", "reference"):
                x, v = call(graph, CASES[case], first, heads, backend=backend)(**tensors)
                slopes = torch.autograd.grad(x.sum() + v.sum(), list(tensors.values()))
                results.append(((x, v), slopes))
            for native, twin in zip(results[0][0], results[1][0], strict=True):
                finite = twin.isfinite()
                assert torch.equal(native.isfinite(), finite), name
                assert native[twin.isnan()].isnan().all(), name
                torch.testing.assert_close(native[finite], twin[finite])
            for of, native, twin in zip(tensors, results[0][1], results[1][1], strict=True):
                if of != "weights":  # the twin's taps outside the windows are zeros, times NaN
                    assert not bool((native.isfinite() & ~twin.isfinite()).any()), f"{name}: d {of}"


@pytest.mark.parametrize("case", ["equivariant transformer, table", "equivariant transformer, exact"])
def test_taps_of_zero_hide_no_broken_weights(case: str) -> None:
    graph = GRAPHS["mixed batch"]()
    tensors, first, heads = inputs(graph, CASES[case])
    with torch.no_grad():
        tensors["taps"].zero_()
        tensors["weights"][first[0]] = torch.inf
    x, _ = call(graph, CASES[case], first, heads)(**tensors)
    assert x[graph.edge_index[1, 0]].isnan().all()


def test_third_derivative_is_refused() -> None:
    graph, case = GRAPHS["mixed batch"](), CASES["neighbour embedding, table"]
    tensors, first, heads = inputs(graph, case)
    x = call(graph, case, first, heads)(**tensors)
    (slope,) = torch.autograd.grad(x.square().sum(), tensors["taps"], create_graph=True)
    (bend,) = torch.autograd.grad(slope.square().sum(), tensors["taps"], create_graph=True)
    with pytest.raises(NotImplementedError, match="radial_messages: a third derivative"):
        torch.autograd.grad(bend.sum(), tensors["taps"])


def test_without_gradients_in_any_layout_and_under_compile() -> None:
    graph, case = GRAPHS["mixed batch"](), CASES["equivariant transformer, table"]
    tensors, first, heads = inputs(graph, case)
    message = call(graph, case, first, heads)
    with torch.no_grad():
        x, v = message(**tensors)
    assert not x.requires_grad
    with torch.inference_mode():
        assert torch.equal(message(**tensors)[1], v)
    strided = {name: t.detach().t().contiguous().t() if t.ndim == 2 else t for name, t in tensors.items()}
    assert torch.equal(message(**strided)[0], x)

    @torch.compile(backend="eager")
    def doubled(values: Tensor) -> Tensor:  # the op breaks the graph, and works
        return 2 * message(**(tensors | {"values": values}))[0]

    assert torch.equal(doubled(tensors["values"]), 2 * x)


def test_bad_arguments() -> None:
    graph, case = GRAPHS["mixed batch"](), CASES["equivariant transformer, exact"]
    tensors, first, _ = inputs(graph, case)

    def refused(error: type[Exception], match: str, heads: int = 2, **changes: Any) -> None:
        given = {k: t for k, t in (tensors | changes).items() if t is not None}
        options = {"backend": given.pop("backend", "native")}
        with pytest.raises(error, match=match):
            call(graph, case, given.pop("first", first), heads, **options)(**given)

    refused(ValueError, "queries, keys: expected both or neither", keys=None)
    refused(ValueError, "vectors, directions: expected both or neither", directions=None)
    refused(ValueError, r"values: expected \(N, 3C\) beside vectors, got", values=tensors["values"][:, 1:])
    refused(ValueError, rf"values: expected shape \({graph.num_atoms}, 12\), got", values=tensors["values"][1:])
    refused(ValueError, r"directions: expected shape \(\d+, 3\)", directions=tensors["directions"][:, 1:])
    refused(ValueError, r"filter_weights: expected shape \(9, 16\)", weights=tensors["weights"][1:])
    refused(ValueError, r"taps.values: expected shape", taps=tensors["taps"][1:])
    refused(ValueError, r"taps.first: expected \(\d+,\) int32", first=first.long())
    refused(ValueError, r"taps: expected windows within the 9 functions", first=first + 9)
    refused(ValueError, r"taps: expected windows within the 9 functions", first=first - 9)
    refused(ValueError, "heads: expected a divisor of 4 channels", heads=3)
    refused(TypeError, "keys: expected float32 or float64 as all its tensors", keys=tensors["keys"].float())
    refused(ValueError, "envelope: expected the device of values", envelope=tensors["envelope"].to("meta"))
    refused(ValueError, "backend: expected native, reference, pyg", backend="fused")
    x, taps, weights = tensors["values"][:, :4], RadialTaps(tensors["taps"], first, COUNT), tensors["weights"][:, :4]
    with pytest.raises(ValueError, match="activation: expected identity or silu"):
        radial_messages(x, taps, weights, graph, activation="relu")  # type: ignore[arg-type]

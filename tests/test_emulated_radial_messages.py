"""The CUDA kernels of the radial messages, compiled as host C++ against tests/emulation, give what the CPU's give."""

from __future__ import annotations

import itertools
from types import ModuleType, SimpleNamespace

import pytest
import torch
from radial_message_cases import CASES, GRAPHS, MODULE, assert_close, call, derivatives, inputs
from systems import FCC, batch_of, supercell
from torch.autograd import gradcheck, gradgradcheck

from dpt_hpc.ops import radius_graph

TOLERANCES = ((torch.float64, 1e-12), (torch.float32, 2e-5))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GRAPHS)
def test_all_passes_equal_the_cpu(emulated: ModuleType, name: str, case: str) -> None:
    graph = GRAPHS[name]()
    for dtype, tolerance in TOLERANCES:
        tensors, first, heads = inputs(graph, CASES[case], 6, 2, dtype)
        found = derivatives(graph, CASES[case], tensors, first, heads, cuda=emulated)
        assert_close(found, derivatives(graph, CASES[case], tensors, first, heads), tolerance)


@pytest.mark.parametrize("case", ["equivariant transformer, exact", "vectors without attention, table"])
@pytest.mark.parametrize(
    ("channels", "heads"),
    [(48, 3), (35, 1), (40, 8), (66, 2), (33, 33)],
    ids=["two heads a warp", "a head longer than a warp", "heads of five", "two long heads", "heads of one"],
)
def test_channels_of_any_number(emulated: ModuleType, channels: int, heads: int, case: str) -> None:
    graph = GRAPHS["one atom with its own images"]()
    for dtype, tolerance in TOLERANCES:
        tensors, first, heads_ = inputs(graph, CASES[case], channels, heads, dtype)
        found = derivatives(graph, CASES[case], tensors, first, heads_, cuda=emulated)
        assert_close(found, derivatives(graph, CASES[case], tensors, first, heads_), tolerance)


def test_a_crystal_of_several_blocks(emulated: ModuleType) -> None:
    graph = radius_graph(*batch_of([supercell(FCC, 3.6, 1, rattle=0.1)]), 3.7, max_neighbors=11)
    case = CASES["equivariant transformer, table"]
    for dtype, tolerance in TOLERANCES:
        tensors, first, heads = inputs(graph, case, 32, 2, dtype)
        found = derivatives(graph, case, tensors, first, heads, cuda=emulated)
        assert_close(found, derivatives(graph, case, tensors, first, heads), tolerance)


@pytest.mark.parametrize("case", CASES)
def test_derivatives(emulated: ModuleType, case: str) -> None:
    graph = GRAPHS["isolated atom"]()
    tensors, first, heads = inputs(graph, CASES[case], 2, 2)
    message = call(graph, CASES[case], first, heads, cuda=emulated)

    def function(*values: torch.Tensor) -> object:
        return message(**dict(zip(tensors, values, strict=True)))

    assert gradcheck(function, tuple(tensors.values()), fast_mode=True)
    assert gradgradcheck(function, tuple(tensors.values()), fast_mode=True)


def test_only_what_is_wanted(emulated: ModuleType) -> None:
    """As training asks: the first backward for the geometry alone, the second for the weights; and every single one."""
    graph, case = GRAPHS["nearest 5, asymmetric"](), CASES["equivariant transformer, exact"]
    geometry = ("taps", "directions", "envelope")
    names = list(inputs(graph, case)[0])
    questions = [(geometry, tuple(n for n in names if n not in geometry)), *((geometry, (n,)) for n in names)]
    questions += [((n,), tuple(names)) for n in names]
    for inner, outer in questions:
        results = []
        for cuda in (None, emulated):
            tensors, first, heads = inputs(graph, case, 2, 2)
            x, v = call(graph, case, first, heads, cuda)(**{k: t * 1 for k, t in tensors.items()})
            total = x.square().sum() + v.square().sum()
            slopes = torch.autograd.grad(total, [tensors[k] for k in inner], create_graph=True)
            loss = sum(g.square().sum() for g in slopes)
            wanted = [tensors[k] for k in outer]
            results.append(torch.autograd.grad(loss, wanted, materialize_grads=True))
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_one_of_the_two_results_in_a_loss(emulated: ModuleType) -> None:
    """The other one's gradient does not exist."""
    graph, case = GRAPHS["mixed batch"](), CASES["equivariant transformer, table"]
    for which in (0, 1):
        results = []
        for cuda in (None, emulated):
            tensors, first, heads = inputs(graph, case, 2, 2)
            y = call(graph, case, first, heads, cuda)(**tensors)[which]
            slopes = torch.autograd.grad(
                y.square().sum(), list(tensors.values()), create_graph=True, materialize_grads=True
            )
            loss = sum(g.square().sum() for g in slopes)
            results.append((*slopes, *torch.autograd.grad(loss, list(tensors.values()), materialize_grads=True)))
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_weights_from_several_lots_of_edges(emulated: ModuleType) -> None:
    """More edges than the workspace holds: the lots are added in their order."""
    graph, case = radius_graph(*batch_of([supercell(FCC, 3.6, 3, rattle=0.1)]), 6.5), CASES["plain sum"]
    assert graph.num_edges > 8192
    for dtype, tolerance in TOLERANCES:
        results = []
        for cuda in (None, emulated):
            tensors, first, heads = inputs(graph, case, 1, 1, dtype)
            y = call(graph, case, first, heads, cuda)(**tensors)
            results.append({"weights": torch.autograd.grad(y.sum(), tensors["weights"])[0]})
        assert_close(results[1], results[0], tolerance)


@pytest.mark.parametrize("case", ["equivariant transformer, exact", "continuous filters"])
def test_same_bits_in_any_order_of_the_threads(emulated: ModuleType, case: str) -> None:
    graph = GRAPHS["one atom with its own images"]()
    tensors, first, heads = inputs(graph, CASES[case], 36, 2, torch.float32)
    runs = []
    for seed in (0, 0, 7, 12345):
        emulated.set_seed(seed)
        runs.append(derivatives(graph, CASES[case], tensors, first, heads, cuda=emulated))
    emulated.set_seed(0)
    for other in runs[1:]:
        assert all(torch.equal(value, other[name]) for name, value in runs[0].items())


def test_rows_do_not_depend_on_the_rest_of_the_batch(emulated: ModuleType) -> None:
    case = CASES["equivariant transformer, table"]
    alone = GRAPHS["one atom with its own images"]()
    small, first, heads = inputs(alone, case, 4, 2, torch.float32)
    results = []
    for copies in (1, 2):
        graph = SimpleNamespace(
            num_atoms=copies,
            num_edges=copies * alone.num_edges,
            edge_index=torch.cat([alone.edge_index + k for k in range(copies)], 1),
            target_ptr=torch.arange(copies + 1) * alone.num_edges,
        )
        repeated = {k: t if k in ("weights", "bias") else torch.cat([t] * copies) for k, t in small.items()}
        x, v = call(graph, case, first.repeat(copies), heads, emulated)(**repeated)
        results.append((x[-1], v[-1]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_number_that_is_not_finite_reaches_the_results(emulated: ModuleType, value: float) -> None:
    graph, case = GRAPHS["mixed batch"](), CASES["equivariant transformer, table"]
    for name in ("values", "taps", "queries", "vectors", "directions", "envelope"):
        tensors, first, heads = inputs(graph, case, 4, 2)
        tensors = {k: t.detach() for k, t in tensors.items()}
        tensors[name].view(-1)[0] = value
        results = [call(graph, case, first, heads, cuda)(**tensors) for cuda in (None, emulated)]
        for found, expected in zip(results[1], results[0], strict=True):
            assert not bool((found.isfinite() & ~expected.isfinite()).any()), name


def test_the_order_by_window_is_made_once(emulated: ModuleType) -> None:
    graph, case = GRAPHS["mixed batch"](), CASES["neighbour embedding, table"]
    tensors, first, _ = inputs(graph, case, 4, 1)
    taps = MODULE.RadialTaps(tensors["taps"], first, 9)
    y, _ = MODULE.fused(tensors["values"], taps, tensors["weights"], graph, cuda=emulated)
    assert "_kept" not in taps.__dict__
    y.sum().backward()
    order, ptr = taps.by_first
    assert taps.by_first[0] is order
    assert torch.equal(order, torch.argsort(first, stable=True))
    assert all(bool((first[order[a:b]] == k).all()) for k, (a, b) in enumerate(itertools.pairwise(ptr.tolist())))

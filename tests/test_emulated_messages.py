"""cgconv's CUDA kernels, compiled as host C++ against tests/emulation, give what the CPU's kernels give."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import pytest
import torch
from message_cases import BASES, GAUSSIANS, GRAPHS, SPLINES, assert_close, derivatives, inputs
from systems import FCC, NASTY, batch_of, supercell
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dpt_hpc.models import CGCNNOptions, build_model, predict
from dpt_hpc.ops import RadialBasis, RadiusGraph, messages, messages_cuda, radius_graph
from dpt_hpc.ops.messages import fused
from dpt_hpc.structure import Batch, Structure

TOLERANCES = ((torch.float64, 1e-13), (torch.float32, 3e-6))


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", GRAPHS)
def test_all_passes_equal_the_cpu(emulated: ModuleType, name: str, kind: str, aggregation: str) -> None:
    graph, basis = GRAPHS[name](), BASES[kind]
    for dtype, tolerance in TOLERANCES:
        # 12 channels: loads of four numbers in float32; 35: one at a time, in two steps of a warp.
        for channels in (12, 35):
            tensors = inputs(graph, basis, channels, dtype)
            found = derivatives(tensors, basis, graph, partial(fused, aggregation=aggregation, cuda=emulated))
            assert_close(found, derivatives(tensors, basis, graph, aggregation=aggregation), tolerance)


@pytest.mark.parametrize("kind", BASES)
def test_several_chunks_of_edges_and_steps_of_channels(
    emulated: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SPLINE_CHUNK", "GAUSSIAN_CHUNK"):
        monkeypatch.setattr(messages_cuda, name, 5)
    graph = radius_graph(*batch_of([supercell(FCC, 3.6, 1, rattle=0.1)]), 3.7)
    basis = BASES[kind] if kind == "bspline" else RadialBasis("gaussian", count=70, start=0, spacing=0.05, width=0.2)
    for dtype, tolerance in TOLERANCES:
        tensors = inputs(graph, basis, 132, dtype)
        assert_close(
            derivatives(tensors, basis, graph, partial(fused, cuda=emulated)),
            derivatives(tensors, basis, graph),
            tolerance,
        )


@pytest.mark.parametrize("kind", BASES)
def test_only_what_is_wanted(emulated: ModuleType, kind: str) -> None:
    """As training asks: the first backward for the lengths alone, the second without them; and every single one."""
    graph, basis = GRAPHS["nearest 5, asymmetric"](), BASES[kind]
    for inner in ([2], [0], [1], [3], [0, 3]):
        for outer in ([0, 1, 3], [0], [1], [2], [3]):
            results = []
            for cuda in (None, emulated):
                tensors = inputs(graph, basis, 4)
                y = fused(*(t * 1 for t in tensors), basis, graph, cuda=cuda)
                first = torch.autograd.grad(y.square().sum(), [tensors[k] for k in inner], create_graph=True)
                loss = sum(g.square().sum() for g in first)
                results.append(torch.autograd.grad(loss, [tensors[k] for k in outer]))
            for found, expected in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", BASES)
def test_derivatives(emulated: ModuleType, kind: str) -> None:
    graph, basis = GRAPHS["isolated atom"](), BASES[kind]

    def message(*tensors: Tensor) -> Tensor:
        return fused(*tensors, basis, graph, cuda=emulated)

    tensors = inputs(graph, basis, channels=1)
    assert gradcheck(message, tensors, fast_mode=True)
    assert gradgradcheck(message, tensors, fast_mode=True)


@pytest.mark.parametrize("kind", BASES)
def test_same_bits_in_any_order_of_the_threads(emulated: ModuleType, kind: str) -> None:
    graph, basis = GRAPHS["one atom with its own images"](), BASES[kind]
    tensors = inputs(graph, basis, 36, torch.float32)
    runs = []
    for seed in (0, 0, 7, 12345):
        emulated.set_seed(seed)
        runs.append(derivatives(tensors, basis, graph, partial(fused, cuda=emulated)))
    emulated.set_seed(0)
    for other in runs[1:]:
        assert all(torch.equal(value, other[name]) for name, value in runs[0].items())


@pytest.mark.parametrize("kind", BASES)
def test_rows_do_not_depend_on_the_rest_of_the_batch(emulated: ModuleType, kind: str) -> None:
    crystals = [supercell(FCC, 3.6, 1, rattle=0.1), NASTY["triclinic, smaller than the cutoff"]]
    both, alone = (radius_graph(*batch_of(systems), 4.0) for systems in (crystals, crystals[1:]))
    tensors = inputs(both, BASES[kind], 8, torch.float32)
    of_alone = [t.detach()[-n:] for t, n in zip(tensors, (3, 3, alone.num_edges, BASES[kind].count), strict=True)]
    results = []
    for graph, arguments in (both, tensors), (alone, [t.requires_grad_() for t in of_alone]):
        y = fused(*arguments, BASES[kind], graph, cuda=emulated)
        first = torch.autograd.grad(y.square().sum(), arguments[:3], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), arguments[:3])
        results.append([y, *first, *second])
    for whole, part in zip(*results, strict=True):
        assert torch.equal(whole[-part.shape[0] :], part)


@pytest.mark.parametrize("filters", ["exact", "table"])
def test_a_network_and_its_training_gradient(
    emulated: ModuleType, filters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energy, forces, stress and the gradient of a loss on them, with every message on the emulated GPU."""
    torch.manual_seed(0)
    model = build_model(CGCNNOptions(cutoff=3.0, filters=filters)).double().train()
    triclinic = NASTY["triclinic, smaller than the cutoff"]
    crystal = Structure(triclinic.positions, triclinic.cell, triclinic.pbc, torch.tensor([8, 22, 56]))
    results = []
    for cuda in (None, emulated):
        monkeypatch.setattr(messages, "fused", lambda *arguments, cuda=cuda: fused(*arguments[:7], cuda))
        p = predict(model, Batch.from_structures([crystal], dtype=torch.float64))
        assert p.forces is not None
        assert p.stress is not None
        loss = p.energy.square().sum() + p.forces.square().sum() + p.stress.square().sum()
        gradients = torch.autograd.grad(loss, [q for q in model.parameters() if q.requires_grad])
        results.append([p.energy, p.forces, p.stress, *gradients])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_lengths_at_knots_outside_the_table_and_not_finite(emulated: ModuleType) -> None:
    graph = GRAPHS["one atom with its own images"]()
    tensors = inputs(graph, SPLINES, 4)
    knots = SPLINES.start + SPLINES.spacing * (torch.arange(graph.num_edges, dtype=torch.float64) - 4)
    assert knots[-1] > SPLINES.start + SPLINES.spacing * (SPLINES.count + 2)
    tensors[2] = knots.requires_grad_()
    arguments = tensors, SPLINES, graph
    assert_close(derivatives(*arguments, partial(fused, cuda=emulated)), derivatives(*arguments), 1e-12)
    for basis, value in ((b, v) for b in BASES.values() for v in (torch.inf, -torch.inf, torch.nan)):
        broken = [t.detach() for t in inputs(graph, basis, 4)]
        broken[2][0] = value
        torch.testing.assert_close(
            fused(*broken, basis, graph, cuda=emulated), fused(*broken, basis, graph), equal_nan=True
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1.2e-6), (torch.float64, 2e-15)])
def test_activations_keep_their_relative_accuracy(emulated: ModuleType, dtype: torch.dtype, tolerance: float) -> None:
    """One edge with no filter: y is sigmoid(g) softplus(s), channel by channel, and its gradient that of it."""
    axis = torch.cat([torch.linspace(-85, 85, 35), torch.tensor([-1e-3, -0.0, 0.0, 1e-3, 1.0, -1.0])]).double()
    g, s = (t.flatten().to(dtype) for t in torch.meshgrid(axis, axis, indexing="ij"))
    graph = RadiusGraph(torch.tensor([[1], [0]]), torch.zeros(1, 3, dtype=torch.int32), torch.tensor([0, 1, 1]))
    features = torch.zeros(2, 2 * len(g), dtype=dtype)
    features[0] = torch.cat([g, s])
    features.requires_grad_()
    zeros = torch.zeros_like(features), torch.ones(1, dtype=dtype), torch.zeros(4, 2 * len(g), dtype=dtype)
    y = fused(features, *zeros, RadialBasis("bspline", 4, 0.0, 1.0, 1.0), graph, cuda=emulated)
    slopes = torch.autograd.grad(y.sum(), features, create_graph=True)[0][0].chunk(2)
    curvatures = [torch.autograd.grad(part.sum(), features, retain_graph=True)[0][0].chunk(2) for part in slopes]

    # In float64, in the forms that do not cancel.
    g, s = g.double(), s.double()
    sigmoid, softplus, slope = torch.sigmoid(g), s.clamp(min=0) + torch.log1p(torch.exp(-s.abs())), torch.sigmoid(s)
    sigmoid1, slope1 = sigmoid * torch.sigmoid(-g), slope * torch.sigmoid(-s)
    for value, exact, scale in (
        (y[0], sigmoid * softplus, 1),
        (slopes[0], sigmoid1 * softplus, 1),
        (slopes[1], sigmoid * slope, 1),
        (curvatures[0][0], -sigmoid1 * torch.tanh(g / 2) * softplus, sigmoid1 * softplus),  # zero at g = 0
        (curvatures[0][1], sigmoid1 * slope, 1),
        (curvatures[1][1], sigmoid * slope1, 1),
    ):
        size = scale if isinstance(scale, Tensor) else exact.abs()
        normal = size > 1e-30
        error = ((value.double() - exact) / size)[normal].abs().max()
        assert error < tolerance, f"{error:.2e}"
        assert (value.double() - exact)[~normal].abs().max() < 1e-30


def test_the_order_by_interval_is_made_once_for_the_same_lengths(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    by_interval = messages_cuda._by_interval
    monkeypatch.setattr(messages_cuda, "_by_interval", lambda *a: made.append(1) or by_interval(*a))
    graph = GRAPHS["mixed batch"]()
    tensors = inputs(graph, SPLINES, 4)

    def two_layers() -> list[Tensor]:
        a, b, lengths, table = tensors
        y = fused(a, b, lengths, table, SPLINES, graph, cuda=emulated)
        y = fused(torch.cat([y, y], 1), b, lengths, table, SPLINES, graph, cuda=emulated)
        first = torch.autograd.grad(y.sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), tensors))

    two_layers()
    assert len(made) == 1
    with torch.no_grad():
        tensors[2] -= 0.3
    two_layers()
    assert len(made) == 2


def test_features_at_any_address(emulated: ModuleType) -> None:
    """Rows that 16-byte loads cannot read."""
    graph = GRAPHS["mixed batch"]()
    tensors = inputs(graph, GAUSSIANS, 8, torch.float32)
    shifted = [torch.cat([t.detach().new_zeros(1), t.detach().flatten()])[1:].view(t.shape) for t in tensors]
    assert shifted[0].data_ptr() % 16
    shifted = [t.requires_grad_() for t in shifted]
    found, expected = (derivatives(t, GAUSSIANS, graph, partial(fused, cuda=emulated)) for t in (shifted, tensors))
    assert_close(found, expected, 3e-6)

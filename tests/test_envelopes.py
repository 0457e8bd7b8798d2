"""CGCNN's envelopes: the weighted mean that they say they are, whatever computes it. That energies and forces become
continuous is in test_derivatives.py, with the other networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import CGCNN as SMALL
from plain_models import PlainCGConv
from test_derivatives import SYSTEMS, batch_of
from torch import Tensor

from dpt_hpc.models import CGCNN, CGCNNOptions, build_model, predict
from dpt_hpc.models.cgcnn import closing_gaussians, openness
from dpt_hpc.models.radial import cosine_cutoff, envelope_of, gaussian_basis, polynomial_cutoff


def results(options: CGCNNOptions, *, plain: bool = False) -> list[Tensor]:
    """Energy, forces, stress, and the weights' gradients of a loss on the three."""
    torch.manual_seed(0)
    model = build_model(options).double().train()
    assert isinstance(model.network, CGCNN)
    if plain:
        for convolution in model.network.convolutions:
            convolution.__class__ = PlainCGConv
    p = predict(model, batch_of(SYSTEMS["mixed"]))
    assert p.forces is not None
    assert p.stress is not None
    loss = p.energy.square().sum() + 5 * p.forces.square().sum() + 50 * p.stress.square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [t.detach() for t in (p.energy, p.forces, p.stress, *gradients)]


@pytest.mark.parametrize("filters", ["exact", "table"])
@pytest.mark.parametrize("envelope", ["cosine", "polynomial"])
@pytest.mark.parametrize("max_neighbors", [None, 7])
def test_messages_are_weighted_by_the_envelope(envelope: str, filters: str, max_neighbors: int | None) -> None:
    options: CGCNNOptions = replace(SMALL, envelope=envelope, filters=filters, max_neighbors=max_neighbors, layers=2)
    twin = results(replace(options, filters="exact"), plain=True)
    tolerance = 1e-11 if filters == "exact" else 1e-4
    for found, expected in zip(results(options), twin, strict=True):
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_the_gate_is_closed_by_further_gaussians(width: float) -> None:
    basis = gaussian_basis(8.0, 50, width)
    longer, weights = closing_gaussians(basis)
    assert (longer.start, longer.spacing, longer.width) == (basis.start, basis.spacing, basis.width)
    before = torch.tensor([0, 1, 2.3, 4, 5], dtype=torch.float64)
    odds = torch.exp(longer(8.0 - before * basis.width)[:, 50:] @ weights)
    assert float(odds[0]) == pytest.approx(4.248e-18, rel=1e-3)
    assert (odds.diff() > 0).all()
    assert 0.45 < float(odds[2]) < 0.6
    assert float(odds[3]) > 0.997
    close = openness(8.0 - before * basis.width, 8.0, basis.width)
    assert float((close - odds).abs().max()) < 0.2
    assert float(close[0]) < 1e-17


@pytest.mark.parametrize("filters", ["exact", "table"])
def test_the_gate_multiplies_the_odds_of_every_message(filters: str) -> None:
    """Against the gate written out; other backends are compared in test_backends.py."""
    options: CGCNNOptions = replace(SMALL, envelope="gate", layers=2)
    tolerance = 1e-11 if filters == "exact" else 1e-4
    found = results(replace(options, filters=filters))
    for value, expected in zip(found, results(options, plain=True), strict=True):
        assert float((value - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_envelopes_at_a_few_lengths() -> None:
    lengths = torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0], dtype=torch.float64)
    cosine = torch.tensor([1, 0.8535533906, 0.5, 0.1464466094, 0], dtype=torch.float64)
    polynomial = torch.tensor([1, 0.9957733154, 0.85546875, 0.3214569092, 0], dtype=torch.float64)
    torch.testing.assert_close(cosine_cutoff(lengths, 8.0), cosine)
    torch.testing.assert_close(polynomial_cutoff(lengths, 8.0), polynomial)
    for kind in ("cosine", "polynomial"):
        rounded = torch.tensor([8.0 + 1e-6], requires_grad=True, dtype=torch.float64)
        end = envelope_of(kind, rounded, 8.0)
        (slope,) = torch.autograd.grad(end.sum(), rounded)
        assert (abs(float(end.detach())), abs(float(slope))) < (1e-15, 1e-15)

"""SchNet and PaiNN against their published equations, written out one edge at a time, with the networks' weights.

The transformer has an oracle of its own (plain_torchmd_et.py); derivatives, symmetries and batches of all networks are
in test_derivatives.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from networks import SMALL
from test_derivatives import SYSTEMS, batch_of
from torch import Tensor
from torch.nn import functional

from dpt_hpc.models import EnergyModel, ModelOptions, build_model
from dpt_hpc.models.derivatives import build_graph, edge_vectors

SCHNET, PAINN = (next(o for o in SMALL if o.name == name) for name in ("schnet", "painn"))
Weights = dict[str, Tensor]


def network(options: ModelOptions) -> EnergyModel:
    """In float64, its biases moved from zero."""
    torch.manual_seed(0)
    model = build_model(options).network.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def dense(w: Weights, name: str, x: Tensor) -> Tensor:
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", torch.zeros(1, dtype=torch.float64))


def ssp(x: Tensor) -> Tensor:
    return torch.log(0.5 * torch.exp(x) + 0.5)


def decay(d: float, cutoff: float) -> float:
    return 0.5 * (math.cos(math.pi * d / cutoff) + 1)


def edges_of(edge_index: Tensor, vectors: Tensor) -> Iterator[tuple[int, int, float, Tensor]]:
    """i, j, |r|, r / |r| of every edge j -> i."""
    for j, i, r in zip(*edge_index.tolist(), vectors, strict=True):
        yield i, j, float(r.norm()), r / r.norm()


def plain_schnet(w: Weights, numbers: list[int], edges: list[tuple[int, int, float, Tensor]]) -> Tensor:
    """Scalars of the atoms (Schütt et al. 2018, figure 2), 2 blocks, 21 Gaussians of 0.3 Å on 5 Å."""
    x = [w["embedding.weight"][z - 1] for z in numbers]
    for block in ("interactions.0.", "interactions.1."):
        sums = [torch.zeros_like(a) for a in x]
        for i, j, d, _ in edges:
            gaussians = torch.exp(-0.5 * ((d - 0.25 * torch.arange(21, dtype=torch.float64)) / 0.3) ** 2)
            filter_ = ssp(dense(w, block + "second_filter", ssp(dense(w, block + "first_filter", gaussians))))
            sums[i] = sums[i] + filter_ * decay(d, 5.0) * dense(w, block + "to_neighbors", x[j])
        x = [a + dense(w, block + "second", ssp(dense(w, block + "first", m))) for a, m in zip(x, sums, strict=True)]
    return torch.stack(x)


def plain_painn(w: Weights, numbers: list[int], edges: list[tuple[int, int, float, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scalars and vectors of the atoms (Schütt, Unke & Gastegger 2021, eqs 7-10), 2 blocks, 8 radial functions, 5 Å."""
    s = [w["embedding.weight"][z - 1] for z in numbers]
    v = [torch.zeros(3, len(s[0]), dtype=torch.float64) for _ in s]
    for k in range(2):
        message, update = f"messages.{k}.", f"updates.{k}."
        phi = [dense(w, message + "second", functional.silu(dense(w, message + "first", a))) for a in s]
        ds, dv = [torch.zeros_like(a) for a in s], [torch.zeros_like(a) for a in v]
        for i, j, d, unit in edges:
            radial = torch.tensor([math.sin(n * math.pi * d / 5.0) / d for n in range(1, 9)], dtype=torch.float64)
            of_scalars, of_vectors, of_direction = (
                phi[j] * dense(w, message + "filters", radial) * decay(d, 5.0)
            ).chunk(3)
            ds[i] = ds[i] + of_scalars
            dv[i] = dv[i] + v[j] * of_vectors + unit[:, None] * of_direction
        s, v = [a + b for a, b in zip(s, ds, strict=True)], [a + b for a, b in zip(v, dv, strict=True)]
        u_weight, v_weight = w[update + "mix.weight"].chunk(2)
        for i in range(len(s)):
            uv, vv = v[i] @ u_weight.T, v[i] @ v_weight.T
            norm = (vv.square().sum(0) + 1e-4).sqrt()
            both = functional.silu(dense(w, update + "first", torch.cat([s[i], norm])))
            a_ss, a_sv, a_vv = dense(w, update + "second", both).chunk(3)
            s[i], v[i] = s[i] + a_ss + a_sv * (uv * vv).sum(0), v[i] + a_vv * uv
    return torch.stack(s), torch.stack(v)


@pytest.mark.parametrize("options", [SCHNET, PAINN], ids=["schnet", "painn"])
def test_features_and_energies_are_those_of_the_published_equations(options: ModelOptions) -> None:
    model = network(options)
    weights = {name: w.detach() for name, w in model.state_dict().items()}
    batch = batch_of(SYSTEMS["mixed"])
    graph = build_graph(model, batch)
    vectors = edge_vectors(batch.positions, batch.cell, graph, batch.batch)
    edges, numbers = list(edges_of(graph.edge_index, vectors)), batch.atomic_numbers.tolist()
    with torch.no_grad():
        found = model.node_features(batch.atomic_numbers, vectors, graph)
        energies = model.read_out(found, batch.atom_ptr)
    if options.name == "schnet":
        scalars, act = plain_schnet(weights, numbers, edges), ssp
    else:
        (scalars, expected), act = plain_painn(weights, numbers, edges), functional.silu
        assert found.vectors is not None
        assert float(expected.abs().max()) > 1e-2
        torch.testing.assert_close(found.vectors, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.scalars, scalars, rtol=1e-10, atol=1e-10)
    of_atoms = torch.stack([dense(weights, "output", act(dense(weights, "readout.0", x))) for x in scalars])[:, 0]
    expected_energies = torch.stack([e.sum() for e in of_atoms.split(batch.atoms_per_structure.tolist())])
    torch.testing.assert_close(energies, expected_energies, rtol=1e-10, atol=1e-10)


def test_the_mean_is_that_of_the_energies_of_the_atoms() -> None:
    batch = batch_of(SYSTEMS["mixed"])
    for options in (SCHNET, PAINN):
        model, mean = network(options), network(replace(options, pooling="mean"))
        graph = build_graph(model, batch)
        vectors = edge_vectors(batch.positions, batch.cell, graph, batch.batch)
        with torch.no_grad():
            total, average = (m(batch.atomic_numbers, vectors, graph, batch.atom_ptr) for m in (model, mean))
        torch.testing.assert_close(average * batch.atoms_per_structure, total)

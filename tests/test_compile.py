"""torch.compile: the message ops are graph breaks and nothing else, and a compiled network gives the same numbers.

Forces in a loss need the second derivative, which the compiled backward of PyTorch (AOTAutograd, under inductor) does
not have: it refuses. The backend "eager" (Dynamo alone) trains on them; evaluation and energies compile with all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from networks import NETWORKS
from test_derivatives import MOLECULE, TRICLINIC, batch_of
from torch import Tensor

from dpt_hpc.models import EnergyModel, build_model, predict
from dpt_hpc.models.derivatives import build_graph, edge_vectors

BATCH = batch_of([TRICLINIC, MOLECULE])
BREAKS = {
    "cgcnn, exact": {"cgconv": 1},
    "cgcnn, table": {"cgconv": 1},
    "torchmd_et, exact": {"expnorm_taps": 1, "radial_messages": 2},
    "torchmd_et, table": {"radial_messages": 2},
    "schnet, exact": {"gather_aggregate": 1},
}
"""Where one layer breaks the graph: an op and how often. (The transformer's other message is its embedding.)"""


@pytest.fixture(params=BREAKS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    yield str(request.param)
    torch._dynamo.reset()


def network(name: str) -> EnergyModel:
    torch.manual_seed(0)
    return build_model(replace(NETWORKS[name], layers=1)).double().eval()


def compiled(name: str, backend: str) -> EnergyModel:
    model: EnergyModel = torch.compile(network(name), backend=backend)  # type: ignore[assignment]
    return model


def test_only_the_ops_break_the_graph(name: str) -> None:
    model = network(name)
    graph = build_graph(model, BATCH)
    vectors = edge_vectors(BATCH.positions, BATCH.cell, graph, BATCH.batch)
    found = torch._dynamo.explain(model)(BATCH.atomic_numbers, vectors, graph, BATCH.atom_ptr)
    reasons = [" ".join(str(r.reason).split()) for r in found.break_reasons]
    assert all("torch.compiler.disable" in reason for reason in reasons), reasons
    # A break inside a module is told once for each frame that it leaves.
    ops = Counter(reason.partition("<function ")[2].split()[0] for reason in reasons)
    assert set(ops) == set(BREAKS[name])
    assert found.graph_break_count <= 5 * sum(BREAKS[name].values())


@pytest.mark.slow
def test_a_compiled_network_predicts_the_same(name: str) -> None:
    expected = predict(network(name), BATCH)
    model = compiled(name, "aot_eager").eval()
    found = predict(model, BATCH)
    with torch.no_grad():
        without_grad = predict(model, BATCH)
        energy = predict(model, BATCH, forces=False, stress=False).energy
    for field in ("energy", "forces", "stress"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(getattr(without_grad, field), getattr(expected, field), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(energy, expected.energy)


def gradients(model: EnergyModel, *, forces: bool) -> list[Tensor]:
    p = predict(model.train(), BATCH, forces=forces, stress=forces)
    loss = p.energy.square().sum()
    if p.forces is not None and p.stress is not None:
        loss = loss + p.forces.square().sum() + p.stress.square().sum()
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


@pytest.mark.slow
def test_a_compiled_network_trains_on_energies_and_dynamo_alone_on_forces_too(name: str) -> None:
    for backend, forces in (("aot_eager", False), ("eager", True)):
        torch._dynamo.reset()
        found, expected = gradients(compiled(name, backend), forces=forces), gradients(network(name), forces=forces)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_pytorch_refuses_forces_in_a_loss_through_its_compiled_backward() -> None:
    """Should this fail, PyTorch has learnt it: compile the training too."""
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradients(compiled("cgcnn, exact", "aot_eager"), forces=True)

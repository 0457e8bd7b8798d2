"""What every network must pass: forces and stress are the derivatives of its energy, and it knows its symmetries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, SMALL, SMOOTH
from torch import Tensor

from dpt_hpc.errors import DataError
from dpt_hpc.models import NETWORKS as REGISTERED
from dpt_hpc.models import EnergyModel, ModelOptions, build_model, predict
from dpt_hpc.models.derivatives import build_graph, edge_vectors
from dpt_hpc.structure import MAX_ATOMIC_NUMBER, Batch, Structure

STEP = 1e-5  # Å or strain: the error of a central difference is about (STEP / 0.25 Å)^2, the width of a Gaussian


def structure(
    positions: list[list[float]], cell: Tensor, numbers: list[int], pbc: tuple[bool, bool, bool]
) -> Structure:
    return Structure(
        positions=torch.tensor(positions, dtype=torch.float64),
        cell=cell.double(),
        pbc=torch.tensor(pbc),
        atomic_numbers=torch.tensor(numbers),
    )


TRICLINIC = structure(
    [[0.1, 0.2, 0.3], [1.4, 1.1, 0.9], [2.0, 0.3, 2.2]],
    torch.tensor([[3.1, 0.0, 0.0], [0.9, 2.9, 0.0], [-0.7, 0.5, 3.3]]),
    [8, 22, 56],
    (True, True, True),
)
ONE_ATOM = structure(
    [[0.4, 0.1, 0.2]], torch.tensor([[2.5, 0.0, 0.2], [0.1, 2.6, 0.0], [0.3, 0.0, 2.4]]), [29], (True, True, True)
)
SLAB = structure(
    [[0.0, 0.0, 5.0], [1.5, 1.4, 6.9], [0.2, 0.1, 8.7]],
    torch.diag(torch.tensor([3.0, 3.1, 20.0])),
    [42, 16, 16],
    (True, True, False),
)
MOLECULE = structure([[0.0, 0.0, 0.0], [0.0, 0.1, 1.1]], torch.eye(3) * 12, [7, 1], (False, False, False))
SYSTEMS = {
    "triclinic": [TRICLINIC],
    "one_atom": [ONE_ATOM],
    "slab": [SLAB],
    "mixed": [SLAB, ONE_ATOM, MOLECULE, TRICLINIC],
}


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> EnergyModel:
    """Each network in float64 and eval mode; its biases moved from where some start, which is zero."""
    torch.manual_seed(0)
    model = build_model((NETWORKS | SMOOTH)[request.param]).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return model


def batch_of(structures: list[Structure]) -> Batch:
    return Batch.from_structures(structures, dtype=torch.float64)


def energies(model: EnergyModel, batch: Batch) -> Tensor:
    return predict(model, batch, forces=False, stress=False).energy.detach()


@pytest.mark.parametrize("name", SYSTEMS)
def test_forces_are_the_finite_differences_of_the_energy(name: str, model: EnergyModel) -> None:
    batch = batch_of(SYSTEMS[name])
    forces = predict(model, batch).forces
    assert forces is not None
    numeric = torch.zeros_like(batch.positions)
    for i in range(batch.num_atoms):
        for axis in range(3):
            shift = torch.zeros_like(batch.positions)
            shift[i, axis] = STEP
            up, down = (
                energies(model, replace(batch, positions=batch.positions + sign * shift)).sum() for sign in (1, -1)
            )
            numeric[i, axis] = -(up - down) / (2 * STEP)
    scale = numeric.abs().max().clamp(min=1e-3)
    assert (forces - numeric).abs().max() / scale < 1e-6


@pytest.mark.parametrize("name", SYSTEMS)
def test_stress_is_the_finite_difference_of_the_energy_per_volume(name: str, model: EnergyModel) -> None:
    batch = batch_of(SYSTEMS[name])
    stress = predict(model, batch).stress
    assert stress is not None
    numeric = torch.zeros_like(batch.cell)
    for a in range(3):
        for b in range(3):
            strain = torch.zeros(3, 3, dtype=torch.float64)
            strain[a, b] += STEP / 2
            strain[b, a] += STEP / 2
            up, down = (energies(model, strained(batch, sign * strain)) for sign in (1, -1))
            numeric[:, a, b] = (up - down) / (2 * STEP) / batch.volume
    assert (stress - numeric).abs().max() / numeric.abs().max() < 1e-6
    torch.testing.assert_close(stress, stress.transpose(1, 2))


def test_every_network_passes_through_these_tests() -> None:
    assert [type(options) for options in SMALL] == [options for options, _ in REGISTERED]


@pytest.mark.parametrize("kind", [options for options, _ in REGISTERED], ids=lambda k: k.name)
def test_derivatives_at_the_sizes_of_the_preset_under_scaling_and_mean_pooling(kind: type[ModelOptions]) -> None:
    """8 Å, 250 neighbours of which none is cut (a cut would make the energy jump), references and a scale."""
    torch.manual_seed(0)
    model = build_model(kind(pooling="mean", backend=NETWORKS[f"{kind.name}, exact"].backend))
    assert (model.cutoff, model.max_neighbors) == (8.0, 250)
    model.set(scale=2.7, shift=-1.3, element_references=torch.linspace(-9, 2, MAX_ATOMIC_NUMBER + 1))
    model = model.double().eval()
    wide = replace(TRICLINIC, positions=TRICLINIC.positions * 1.1, cell=TRICLINIC.cell * 1.1)
    batch = batch_of([wide, SLAB])
    graph = build_graph(model, batch)
    assert graph.num_truncated == 0
    assert 100 < int(graph.target_ptr.diff().max()) <= 250
    found = predict(model, batch)
    assert found.forces is not None
    assert found.stress is not None
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        direction = torch.randn(batch.positions.shape, dtype=torch.float64, generator=generator)
        up, down = (
            energies(model, replace(batch, positions=batch.positions + sign * STEP * direction)) for sign in (1, -1)
        )
        along = torch.zeros_like(up).index_add(0, batch.batch, (found.forces * direction).sum(1))
        numeric = -(up - down) / (2 * STEP)
        assert (along - numeric).abs().max() / numeric.abs().max() < 1e-6
        strain = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        strain = (strain + strain.T) / 2
        up, down = (energies(model, strained(batch, sign * STEP * strain)) for sign in (1, -1))
        numeric = (up - down) / (2 * STEP) / batch.volume
        assert ((found.stress * strain).sum((1, 2)) - numeric).abs().max() / numeric.abs().max() < 1e-6


def strained(batch: Batch, strain: Tensor) -> Batch:
    return replace(batch, positions=batch.positions + batch.positions @ strain, cell=batch.cell + batch.cell @ strain)


CUTOFF = 5.0
DIRECTION = torch.tensor([0.8, 0.6, 0.0], dtype=torch.float64)


def crossing(beyond: float, others: int) -> Batch:
    """Two atoms CUTOFF + beyond apart, and `others` near the first, which both see."""
    near = [[0.0, 0.0, 0.0], [1.1, 1.2, 0.3], [0.4, -0.9, 1.3]][: 1 + others]
    numbers = [8, 22, 14][: 1 + others]
    far = ((CUTOFF + beyond) * DIRECTION).tolist()
    return batch_of([structure([*near, far], torch.eye(3), [*numbers, 26], (False, False, False))])


@pytest.mark.parametrize("others", [0, 2], ids=["the only pair", "one of several"])
@pytest.mark.parametrize("model", SMOOTH, indirect=True)
def test_energy_and_forces_are_continuous_as_a_pair_crosses_the_cutoff(others: int, model: EnergyModel) -> None:
    """Across the cutoff the energy changes by what the forces say, and the forces by next to nothing."""
    step = 1e-6
    assert (
        build_graph(model, crossing(-step, others)).num_edges
        == build_graph(model, crossing(step, others)).num_edges + 2
    )
    deep, inside, outside = (predict(model, crossing(beyond, others)) for beyond in (-1, -step, step))
    assert deep.forces is not None
    assert inside.forces is not None
    assert outside.forces is not None
    change = float(outside.energy - inside.energy)
    forces = (inside.forces[-1] + outside.forces[-1]) / 2
    assert abs(change + 2 * step * float(forces @ DIRECTION)) < 1e-9 * max(1.0, float(deep.energy.abs()))
    assert float((inside.forces - outside.forces).abs().max()) < 1e-4 * float(deep.forces.abs().max())


@pytest.mark.parametrize("model", ["cgcnn, exact", "torchmd_et, exact"], indirect=True)
def test_without_an_envelope_the_energy_jumps(model: EnergyModel) -> None:
    """As published, and as the options say: should this fail, move the network to SMOOTH."""
    inside, outside = (energies(model, crossing(beyond, 2)) for beyond in (-1e-9, 1e-9))
    assert float((inside - outside).abs()) > 1e-6


def test_batch_equals_the_loop_over_its_structures(model: EnergyModel) -> None:
    structures = SYSTEMS["mixed"]
    together = predict(model, batch_of(structures))
    alone = [predict(model, batch_of([s])) for s in structures]
    for field in ("energy", "forces", "stress"):
        torch.testing.assert_close(
            getattr(together, field), torch.cat([getattr(p, field) for p in alone]), rtol=1e-12, atol=1e-12
        )


def test_no_gradient_crosses_structures(model: EnergyModel) -> None:
    batch = batch_of(SYSTEMS["mixed"])
    positions = batch.positions.clone().requires_grad_()
    model.train()
    energy = predict(model, replace(batch, positions=positions), forces=False, stress=False).energy
    for b in range(batch.num_structures):
        (gradient,) = torch.autograd.grad(energy[b], positions, retain_graph=True)
        assert not gradient[batch.batch != b].any()


def test_rotation_permutation_and_wrapping_change_nothing(model: EnergyModel) -> None:
    batch = batch_of([TRICLINIC])
    before = predict(model, batch)
    assert before.forces is not None
    assert before.stress is not None

    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    rotated = predict(model, replace(batch, positions=batch.positions @ rotation, cell=batch.cell @ rotation))
    torch.testing.assert_close(rotated.energy, before.energy)
    torch.testing.assert_close(rotated.forces, before.forces @ rotation)
    torch.testing.assert_close(rotated.stress, rotation.T @ before.stress @ rotation)

    order = torch.tensor([2, 0, 1])
    permuted = predict(
        model, replace(batch, positions=batch.positions[order], atomic_numbers=batch.atomic_numbers[order])
    )
    torch.testing.assert_close(permuted.energy, before.energy)
    torch.testing.assert_close(permuted.forces, before.forces[order])

    shifts = torch.tensor([[3.0, -1.0, 0.0], [0.0, 0.0, 2.0], [-4.0, 1.0, 1.0]], dtype=torch.float64)
    moved = predict(model, replace(batch, positions=batch.positions + shifts @ batch.cell[0] + 0.3))
    for field in ("energy", "forces", "stress"):
        torch.testing.assert_close(getattr(moved, field), getattr(before, field))


def test_training_gradient_is_the_finite_difference_of_the_loss(model: EnergyModel) -> None:
    """The gradient of a gradient: d/dw of a loss on energy, forces and stress."""
    batch = batch_of([TRICLINIC, ONE_ATOM])
    model.train()

    def loss() -> Tensor:
        p = predict(model, batch)
        assert p.forces is not None
        assert p.stress is not None
        return p.energy.square().sum() + 5 * p.forces.square().sum() + 50 * p.stress.square().sum()

    parameters = [p for p in model.parameters() if p.numel() > 1]
    # A network may have weights that no energy depends on; their gradient is zero, and so must be the difference.
    gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    generator = torch.Generator().manual_seed(2)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * direction
            values.append(float(loss().detach()))
            with torch.no_grad():
                parameter -= sign * 1e-5 * direction
        numeric = (values[0] - values[1]) / 2e-5
        assert numeric == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-8)


def test_features_have_the_sizes_they_are_said_to_have_and_give_the_energy(model: EnergyModel) -> None:
    batch = batch_of(SYSTEMS["mixed"])
    graph = build_graph(model, batch)
    vectors = edge_vectors(batch.positions, batch.cell, graph, batch.batch)
    features = model.node_features(batch.atomic_numbers, vectors, graph)
    assert features.scalars.shape == (batch.num_atoms, model.num_scalars)
    if model.num_vectors:
        assert features.vectors is not None
        assert features.vectors.shape == (batch.num_atoms, 3, model.num_vectors)
    else:
        assert features.vectors is None
    # Without a scale and references, which only the whole model applies.
    torch.testing.assert_close(model.read_out(features, batch.atom_ptr), energies(model, batch))


def test_a_structure_without_edges_has_zero_forces(model: EnergyModel) -> None:
    lonely = structure([[0.0, 0.0, 0.0]], torch.eye(3) * 30, [3], (True, True, True))
    p = predict(model, batch_of([lonely]))
    assert p.forces is not None
    assert p.energy.isfinite().all()
    assert not p.forces.any()
    assert p.stress is not None
    assert not p.stress.any()


def test_a_batch_without_structures_has_empty_predictions(model: EnergyModel) -> None:
    nothing = batch_of([])
    p = predict(model.train(), nothing)
    assert p.forces is not None
    assert p.stress is not None
    assert (p.energy.shape, p.forces.shape, p.stress.shape) == ((0,), (0, 3), (0, 3, 3))


def test_stress_without_a_volume_is_refused(model: EnergyModel) -> None:
    flat = replace(batch_of([MOLECULE]), cell=torch.zeros(1, 3, 3, dtype=torch.float64))
    with pytest.raises(DataError, match="structure 0 of the batch: the cell has zero volume"):
        predict(model, flat)
    unasked = predict(model, flat, stress=torch.tensor([False])).stress
    assert unasked is not None
    assert not unasked.any()

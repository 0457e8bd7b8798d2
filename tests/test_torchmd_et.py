"""The equivariant transformer: the published equations, its table, its vectors, and a short training.

What every network must pass (derivatives, symmetries, batches) is in test_derivatives.py.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import plain_torchmd_et
import pytest
import torch
from networks import ET
from plain_models import PlainET
from small_runs import Options, of_steps, records, run, small_options
from test_derivatives import SYSTEMS, TRICLINIC, batch_of
from torch import Tensor

from dpt_hpc.cli import run_command_line
from dpt_hpc.errors import ConfigError
from dpt_hpc.models import Scaling, TorchMDET, TorchMDETOptions, build_model, predict
from dpt_hpc.models.derivatives import build_graph, edge_vectors
from dpt_hpc.models.radial import spline_coefficients, spline_interpolation
from dpt_hpc.quickstart import PACKAGE, configs
from dpt_hpc.structure import Batch, Structure
from dpt_hpc.train.checkpoint import load_card, load_model
from dpt_hpc.train.finetune import load_pretrained

BACKENDS = ["native", "reference"]


def network(options: TorchMDETOptions = ET, **changes: object) -> TorchMDET:
    """In float64 and eval mode; biases, means and widths moved from where they start, which is zero or all equal."""
    torch.manual_seed(0)
    model = TorchMDET(replace(options, **changes)).double().eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            if name.endswith("bias"):
                parameter += 0.1 * noise
            elif name.startswith("radial"):
                parameter *= 1 + 0.02 * noise
    return model


def plain(model: TorchMDET) -> PlainET:
    """The plain twin with the same weights."""
    options = model.options
    twin = PlainET(model.state_dict(), heads=options.heads, cutoff=options.cutoff, max_neighbors=options.max_neighbors)
    return twin.eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("options", [ET, TorchMDETOptions(cutoff=5.0)], ids=["small", "paper's sizes"])
def test_energy_forces_and_stress_are_those_of_the_published_equations(
    options: TorchMDETOptions, name: str, backend: str
) -> None:
    model = network(options, backend=backend)
    batch = batch_of(SYSTEMS[name])
    ours, theirs = predict(model, batch), predict(plain(model), batch)
    for field in ("energy", "forces", "stress"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_beyond_the_limit_are_cut_as_in_the_published_equations(backend: str) -> None:
    """A directed graph: j may reach i, and i not j."""
    model = network(max_neighbors=7, backend=backend)
    batch = batch_of(SYSTEMS["mixed"])
    assert build_graph(model, batch).num_truncated
    ours, theirs = predict(model, batch), predict(plain(model), batch)
    for field in ("energy", "forces", "stress"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-10, atol=1e-10)


def real_crystals() -> dict[str, Structure]:
    """Four compounds of the sample that ships, of two to five atoms, by their atomic numbers."""
    with gzip.open(PACKAGE / "sample" / "elastic.json.gz", "rt") as file:
        records = json.load(file)
    found: dict[str, Structure] = {}
    for record in records:
        numbers = record["atomic_numbers"]
        if len(found) < 4 and len(numbers) == 2 + len(found) and len(set(numbers)) > 1:
            cell, positions = (torch.tensor(record[k], dtype=torch.float64) for k in ("cell", "positions"))
            pbc = torch.ones(3, dtype=torch.bool)
            found[str(numbers)] = Structure(positions + 0.02, cell, pbc, torch.tensor(numbers))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_crystals_have_the_energy_forces_and_stress_of_the_equations_edge_by_edge(backend: str) -> None:
    """The oracle finds neighbours, strains and differentiates by itself; symmetry is broken, so that forces exist."""
    model = network(layers=2, cutoff=4.2, backend=backend)
    assert "dpt_hpc" not in Path(plain_torchmd_et.__file__).read_text()
    crystals = real_crystals()
    assert len(crystals) == 4
    generator = torch.Generator().manual_seed(2)
    for name, crystal in crystals.items():
        noise = 0.1 * torch.randn(crystal.positions.shape, dtype=torch.float64, generator=generator)
        assert_same_as_the_oracle(model, replace(crystal, positions=crystal.positions + noise), name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_own_images_the_neighbour_embedding_is_that_of_the_paper_s_code(backend: str) -> None:
    """All else stays: attention counts an atom's images there, too."""
    name, crystal = next(iter(real_crystals().items()))
    crystal.positions[0] += 0.1
    model = network(layers=2, cutoff=4.2, backend=backend, own_images=False)
    assert_same_as_the_oracle(model, crystal, name)
    cut = predict(model, batch_of([crystal])).energy
    whole = predict(network(layers=2, cutoff=4.2, backend=backend), batch_of([crystal])).energy
    assert (whole - cut).abs() > 1e-3


@pytest.mark.slow
def test_a_real_crystal_at_the_paper_s_sizes_edge_by_edge() -> None:
    """8 layers of 128 channels, 8 heads, 50 radial functions, 8 Å, the nearest 250, which are all."""
    model = network(TorchMDETOptions())
    crystals = real_crystals()
    name = "[20, 80, 80]"
    assert_same_as_the_oracle(model, crystals[name], name)


def assert_same_as_the_oracle(model: TorchMDET, crystal: Structure, name: str) -> None:
    batch = batch_of([crystal])
    assert build_graph(model, batch).num_truncated == 0
    ours = predict(model, batch)
    weights = {k: w.detach() for k, w in model.state_dict().items()}
    theirs = plain_torchmd_et.energy_forces_stress(
        weights,
        crystal.atomic_numbers.tolist(),
        crystal.positions,
        crystal.cell,
        cutoff=model.cutoff,
        heads=model.options.heads,
        own_images=model.options.own_images,
    )
    assert ours.forces is not None
    assert ours.stress is not None
    assert float(theirs[1].abs().max()) > 1e-4
    for found, expected in zip((ours.energy[0], ours.forces, ours.stress[0]), theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")


def loss_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    p = predict(model.train(), batch)  # type: ignore[arg-type]
    assert p.forces is not None
    assert p.stress is not None
    return p.energy.square().sum() + 5 * p.forces.square().sum() + 50 * p.stress.square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_gradients_are_those_of_the_published_equations(backend: str) -> None:
    """Radial means and widths too, which stand behind every edge's filters."""
    model = network(backend=backend)
    twin = plain(model)
    batch = batch_of(SYSTEMS["mixed"])
    ours, theirs = loss_of(model, batch), loss_of(twin, batch)
    ours.backward()
    theirs.backward()
    pairs = {
        "means": (model.radial.means, twin.means),
        "betas": (model.radial.betas, twin.betas),
        "embedding": (model.embedding.weight, twin.embedding),
        "neighbour embedding": (model.neighbors.embedding.weight, twin.neighbor_embedding),
        "neighbour filters": (model.neighbors.filters.weight, twin.distance_proj.weight),
        "vectors": (model.layers[1].vector_projection.weight, twin.attention[1].vec_proj),
        "attention's norm": (model.layers[1].norm.weight, twin.attention[1].layernorm.weight),
        "output": (model.output.weight, twin.output.weight),
    }
    found = {name: (a.grad, b.grad) for name, (a, b) in pairs.items()}
    for k, (layer, other) in enumerate(zip(model.layers, twin.attention, strict=True)):
        parts = [other.q_proj, other.k_proj, other.v_proj]
        found[f"projections {k}"] = layer.projection.weight.grad, torch.cat([p.weight.grad for p in parts])
        parts = [other.dk_proj, other.dv_proj]
        found[f"filters {k}"] = layer.filters.weight.grad, torch.cat([p.weight.grad for p in parts])
        found[f"filters' bias {k}"] = layer.filters.bias.grad, torch.cat([p.bias.grad for p in parts])
    for name, (a, b) in found.items():
        assert float(b.abs().max()) > 0, name
        torch.testing.assert_close(
            a, b, rtol=1e-8, atol=1e-10 * float(b.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_table_approaches_the_exact_filters(backend: str) -> None:
    """Paper's sizes, errors relative to the largest value: with 512 intervals about 1e-8 in the energy, 1e-5 in forces
    and stress, falling with the fourth and the third power of the intervals."""
    batch = batch_of([TRICLINIC])
    limits = {256: (1e-6, 5e-4), 512: (2e-7, 5e-5), 1024: (1e-8, 5e-6)}
    torch.manual_seed(0)
    exact = TorchMDET(TorchMDETOptions(backend="reference", max_neighbors=None)).double().eval()
    expected = predict(exact, batch)
    for knots, (value, slope) in limits.items():
        options = replace(exact.options, backend=backend, filters="table", table_knots=knots)
        tabulated = TorchMDET(options).double().eval()
        tabulated.load_state_dict(exact.state_dict())
        found = predict(tabulated, batch)
        for field, limit in (("energy", value), ("forces", slope), ("stress", slope)):
            a, b = getattr(found, field), getattr(expected, field)
            error = float((a - b).abs().max() / b.abs().max())
            assert error < limit, f"{knots} {field}"


def test_coefficients_of_splines_are_those_of_the_interpolation() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    found, expected = spline_coefficients(values), spline_interpolation(200) @ values
    torch.testing.assert_close(found[30:-30], expected[30:-30], rtol=0, atol=1e-13)
    few = torch.randn(70, 2, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(spline_coefficients, (few,))
    assert torch.autograd.gradgradcheck(spline_coefficients, (few,))


def test_vectors_turn_with_the_structure() -> None:
    """What a vector head would read; under a reflection too, for vectors are polar."""
    model = network()
    batch = batch_of([TRICLINIC])
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    rotation = torch.stack([rotation, -rotation])
    expected, vectors = features(model, batch)
    assert vectors is not None
    assert vectors.shape == (3, 3, ET.hidden)
    assert float(vectors.abs().max()) > 1e-3
    for turn in rotation:
        scalars, turned = features(model, replace(batch, positions=batch.positions @ turn, cell=batch.cell @ turn))
        assert turned is not None
        torch.testing.assert_close(scalars, expected)
        torch.testing.assert_close(turned, torch.einsum("nic,ij->njc", vectors, turn))


def features(model: TorchMDET, batch: Batch) -> tuple[Tensor, Tensor | None]:
    graph = build_graph(model, batch)
    vectors = edge_vectors(batch.positions, batch.cell, graph, batch.batch)
    with torch.no_grad():
        found = model.node_features(batch.atomic_numbers, vectors, graph)
    return found.scalars, found.vectors


def test_the_energy_reads_the_scalars_that_heads_read() -> None:
    model = network(layers=1)
    batch = batch_of([TRICLINIC])
    scalars, _ = features(model, batch)
    pooled = scalars.sum(0, keepdim=True)
    for layer in model.readout:
        pooled = torch.nn.functional.silu(layer(pooled))
    torch.testing.assert_close(model.output(pooled)[:, 0], predict(model, batch).energy)


def test_means_and_widths_start_as_published() -> None:
    model = TorchMDET(TorchMDETOptions())
    assert model.radial.alpha == 5 / 8
    assert model.radial.means.shape == model.radial.betas.shape == (50,)
    # From exp(-8) to 1 in 49 steps; (0.04 (1 - exp(-8)))^-2. As numbers, not by the formula that is tested.
    some = model.radial.means[[0, 1, 2, 48, 49]]
    expected = torch.tensor([0.00033546263, 0.02073677972, 0.04113809681, 0.97959868291, 1.0])
    torch.testing.assert_close(some, expected)
    torch.testing.assert_close(model.radial.betas, torch.full((50,), 625.41953958))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutoff": 0.0}, r"cutoff is 0\.0, expected more than 0"),
        ({"heads": 7}, r"heads is 7, expected a divisor of hidden, which is 24"),
        ({"layers": 0}, r"layers is 0, expected at least 1"),
    ],
)
def test_a_wrong_option_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ET, **changes)  # type: ignore[arg-type]


SMALL: Options = {
    **{"cutoff": 4.0, "hidden": 16, "layers": 2, "heads": 2, "radial": 12, "readout_hidden": 16, "table_knots": 128},
    "backend": ET.backend,
}


def command(verb: str, preset: str, dataset: Path, run_dir: Path, *settings: str) -> None:
    """The command line with a preset, made small."""
    model = [f"model.{name}={value}" for name, value in SMALL.items()]
    small = ["training.batch_size=6", "training.epochs=3", f"data.path={dataset}", f"run_dir={run_dir}"]
    every = [*small, "data.split.train=0.5", "data.split.validation=0.25", "data.split.test=0.25", *model, *settings]
    arguments = [part for setting in every for part in ("--set", setting)]
    run_command_line([verb, str(configs() / verb / preset), *arguments])


def test_it_trains_from_the_command_line_and_is_fine_tuned(
    small_dataset: Path, finished: tuple[Options, Path], tmp_path: Path
) -> None:
    preset = "torchmd_et_1_500_500.yaml"
    learn = ["optimizer.learning_rate=2e-3", "objective.element_references=true", "data.split.by=structure"]
    command("pretrain", preset, small_dataset, tmp_path / "run", *learn, "model.filters=table")
    losses = [r["validation"]["loss"] for r in records(tmp_path / "run", "epoch")]
    assert losses[-1] < losses[0]
    sizes = {**SMALL, "filters": "table"}
    assert load_card(tmp_path / "run").options == TorchMDETOptions(**sizes)
    model = load_model(tmp_path / "run")
    assert isinstance(model, Scaling)
    assert isinstance(model.network, TorchMDET)

    target = ["objective.target=volume_per_atom", "seeds=[0]", f"pretrained={tmp_path / 'run'}"]
    command("finetune", "torchmd_et_jdft.yaml", small_dataset, tmp_path / "tuned", *target)
    assert (tmp_path / "tuned" / "results.json").exists()

    target[-1] = f"pretrained={finished[1]}"
    with pytest.raises(SystemExit):
        command("finetune", "torchmd_et_jdft.yaml", small_dataset, tmp_path / "other", *target)


def test_weights_of_another_network_are_refused(finished: tuple[Options, Path]) -> None:
    options = TorchMDETOptions(**SMALL)
    with pytest.raises(ConfigError, match=r"model\.name: pre-trained with 'cgcnn', configured 'torchmd_et'"):
        load_pretrained(build_model(options), options, finished[1])


def test_derivative_denoising_stays_finite(small_dataset: Path, tmp_path: Path) -> None:
    options = small_options(small_dataset)
    options["model"] = {"name": "torchmd_et", **SMALL}
    path = run(options, tmp_path / "run", objective={"kind": "derivative_denoising", "noise_scale": 0.1})
    losses = torch.tensor(of_steps(path, "loss"))
    assert losses.isfinite().all()

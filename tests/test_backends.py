"""One switch, the same results: the backends native, reference and pyg, pair by pair.

The backend pyg needs the extra of that name, which compiles for a quarter of an hour. Where it is missing its tests are
skipped, unless DPT_HPC_REQUIRE=pyg says that it must be there, as CI does.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from networks import NETWORKS, SMALL, SMOOTH_ET
from required import required
from systems import NASTY, batch_of, random_system, supercell
from torch import Tensor

from dpt_hpc.errors import DataError, EnvironmentFault
from dpt_hpc.models import CGCNNOptions, ModelOptions, build_model, predict
from dpt_hpc.ops import Backend, RadiusGraph, edge_product, gather_aggregate, radius_graph
from dpt_hpc.structure import Batch, Structure

MISSING = [name for name in ("torch_scatter", "torch_cluster") if importlib.util.find_spec(name) is None]
needs_pyg = pytest.mark.skipif(
    bool(MISSING) and not required("pyg"),
    reason=f"{' and '.join(MISSING)} not installed (make pyg)",
)
PAIRS = [
    pytest.param(*pair, marks=needs_pyg if "pyg" in pair else ())
    for pair in itertools.combinations(get_args(Backend), 2)
]

MIXED = [NASTY[name] for name in ("triclinic, smaller than the cutoff", "one atom with its own images", "left-handed")]
BATCHES = {
    "mixed batch": (MIXED, 2.9, None),
    "isolated atom": ([NASTY["isolated atoms"], NASTY["primitive fcc"]], 3.1, None),
    "one atom with its own images": ([NASTY["one atom with its own images"]], 4.1, None),
    "no edges": ([NASTY["isolated atoms"]], 3.1, None),
    "no atoms": ([NASTY["no atoms"]], 3.1, None),
    "nearest 7, asymmetric": ([*MIXED, NASTY["rattled fcc, through bins"]], 4.1, 7),
}


def assert_same(graph: RadiusGraph, expected: RadiusGraph) -> None:
    for name in ("edge_index", "cell_shifts", "target_ptr"):
        a, b = getattr(graph, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    assert graph.num_truncated == expected.num_truncated


@needs_pyg
@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize(("cutoff", "max_neighbors", "max_images"), [(2.5, None, None), (5.0, 13, None), (5.0, 9, 1)])
def test_pyg_finds_the_native_graph(
    name: str, cutoff: float, max_neighbors: int | None, max_images: int | None
) -> None:
    arguments = (*batch_of([NASTY[name]]), cutoff, max_neighbors, max_images)
    assert_same(radius_graph(*arguments, backend="pyg"), radius_graph(*arguments))


@needs_pyg
def test_pyg_finds_the_native_graph_of_batches_and_random_cells() -> None:
    systems = [*NASTY.values(), supercell([[0, 0, 0]], 2.5, 4, rattle=0.1), *map(random_system, range(40))]
    for cutoff, max_neighbors in ((0.0, None), (3.0, None), (3.0, 11)):
        arguments = (*batch_of(systems), cutoff, max_neighbors)
        assert_same(radius_graph(*arguments, backend="pyg"), radius_graph(*arguments))
    empty = (*batch_of([]), 3.0)
    assert_same(radius_graph(*empty, backend="pyg"), radius_graph(*empty))


@pytest.mark.parametrize("backend", ["native", pytest.param("pyg", marks=needs_pyg)])
def test_broken_structures_are_refused_alike(backend: Backend) -> None:
    positions, cell, pbc, atom_ptr = batch_of([NASTY["no atoms"], NASTY["left-handed"]])
    wrong = positions.clone()
    wrong[1, 2] = torch.nan
    close = positions.clone()
    close[2] = close[0] + 1e-3
    flat = cell.clone()
    flat[1, 0] = flat[1, 1]
    for arguments, message in (
        ((wrong, cell, pbc, atom_ptr), "positions of structure 1 of the batch, atom 1"),
        ((close, cell, pbc, atom_ptr), "of structure 1 of the batch are 0.00173 Å apart"),
        ((positions, flat, pbc, atom_ptr), "cell of structure 1 of the batch: expected periodic vectors that span"),
        ((positions, cell * 1e-4, pbc, atom_ptr), "structure 1 of the batch has about .* periodic images"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            radius_graph(*arguments, 4.0, backend=backend)
        assert caught.value.structure == 1


def labelled(name: str) -> Batch:
    """The batch with atomic numbers and random labels."""
    systems, _, _ = BATCHES[name]
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    structures = [
        Structure(
            positions=s.positions,
            cell=s.cell,
            pbc=s.pbc,
            atomic_numbers=torch.arange(s.num_atoms) % 9 + 6,
            energy=float(normal(1)),
            forces=normal(s.num_atoms, 3),
            stress=normal(3, 3),
        )
        for s in systems
    ]
    return Batch.from_structures(structures, dtype=torch.float64)


CASES: dict[str, ModelOptions] = {
    f"{options.name}, {filters}": replace(options, filters=filters)
    for options in SMALL
    for filters in ("exact", "table")
} | {name: NETWORKS[name] for name in ("cgcnn, cosine envelope", SMOOTH_ET)}
"""Every network, small."""


def step(options: ModelOptions, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """Energies, forces, stress, and the weights' gradients of a training loss on the three."""
    torch.manual_seed(3)
    model = build_model(options).to(dtype).train()
    batch = batch.to(dtype=dtype)
    prediction = predict(model, batch)
    assert prediction.forces is not None
    assert prediction.stress is not None
    terms = (
        (prediction.energy, batch.energy),
        (prediction.forces, batch.forces),
        (10 * prediction.stress, 10 * batch.stress),
    )
    loss = sum((ours - label).square().sum() for ours, label in terms)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = {"energy": prediction.energy, "forces": prediction.forces, "stress": prediction.stress}
    return {name: value.detach().double() for name, value in (values | gradients).items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_training_step_is_the_same(first: Backend, second: Backend, name: str, case: str) -> None:
    _, cutoff, max_neighbors = BATCHES[name]
    options = replace(CASES[case], cutoff=cutoff, max_neighbors=max_neighbors)
    batch = labelled(name)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        a, b = (step(replace(options, backend=backend), batch, dtype) for backend in (first, second))
        assert a.keys() == b.keys()
        for key, value in a.items():
            scale = b[key].abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(value, b[key], rtol=0, atol=tolerance * max(scale, 1e-6), msg=key)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_general_pair_is_the_same(first: Backend, second: Backend, name: str) -> None:
    systems, cutoff, max_neighbors = BATCHES[name]
    graph = radius_graph(*batch_of(systems), cutoff, max_neighbors)
    features = torch.randn(graph.num_atoms, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in (first, second):
        x = features.clone().requires_grad_()
        y = gather_aggregate(edge_product(x, x, graph, backend=backend), x, graph, backend)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_scatter", "torch_cluster"):
        monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    batch = labelled("mixed batch")
    with pytest.raises(EnvironmentFault, match=r"needs torch-cluster.*\n.*pip install .*'dpt-hpc\[pyg\]'"):
        radius_graph(*batch_of(MIXED), 3.0, backend="pyg")
    with pytest.raises(EnvironmentFault, match=r"needs torch-scatter.*\n.*pip install .*'dpt-hpc\[pyg\]'"):
        predict(build_model(CGCNNOptions(backend="pyg")).double(), batch)


def test_an_extra_that_was_built_for_another_torch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_cluster.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_cluster", raising=False)
    with pytest.raises(EnvironmentFault, match=r"needs torch-cluster.*undefined symbol.*built for another torch"):
        radius_graph(*batch_of(MIXED), 3.0, backend="pyg")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="radius_graph: backend: expected native, reference, pyg, got 'cuda'"):
        radius_graph(*batch_of(MIXED), 3.0, backend="cuda")  # type: ignore[arg-type]

"""The CUDA kernels, compiled as host C++ against tests/emulation, give the edges of the CPU kernels."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from emulated import COMPILER, EMULATION, FLAGS, OWN, SANITIZER
from systems import FCC, NASTY, batch_of, random_system, supercell, system
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpt_hpc.errors import DataError
from dpt_hpc.ops import RadiusGraph, radius_fault, radius_graph
from dpt_hpc.ops.radius_graph_cuda import CELL_LIST_ATOMS, edges_by_source, find_edges


def emulated_graph(
    emulated: ModuleType,
    batch: tuple[Tensor, ...],
    cutoff: float,
    max_neighbors: int | None = None,
    max_images: int | None = None,
    cell_list_atoms: int = CELL_LIST_ATOMS,
) -> RadiusGraph:
    """The graph of the emulated kernels, and the by-source order of its edges checked."""
    kernels = emulated.CudaRadiusGraph
    graph = RadiusGraph(*find_edges(kernels, *batch, cutoff, max_neighbors, max_images, cell_list_atoms))
    for found, expected in zip(
        edges_by_source(kernels, graph.edge_index[0], graph.num_atoms), graph.by_source, strict=True
    ):
        assert torch.equal(found, expected)
    return graph


def assert_same(graph: RadiusGraph, expected: RadiusGraph) -> None:
    assert torch.equal(graph.target_ptr, expected.target_ptr)
    assert torch.equal(graph.edge_index, expected.edge_index)
    assert torch.equal(graph.cell_shifts, expected.cell_shifts)
    assert graph.num_truncated == expected.num_truncated


BINS = pytest.mark.parametrize("cell_list_atoms", [CELL_LIST_ATOMS, 20, 0], ids=["pairs", "mixed", "bins"])
"""No structure through bins; the ones of twenty atoms and more; all."""


@BINS
@pytest.mark.parametrize("max_neighbors", [None, 7])
def test_nasty_systems(emulated: ModuleType, max_neighbors: int | None, cell_list_atoms: int) -> None:
    batch = batch_of([NASTY["no atoms"], *NASTY.values()])
    expected = radius_graph(*batch, 3.5, max_neighbors)
    assert expected.num_truncated > 0 or max_neighbors is None
    assert_same(emulated_graph(emulated, batch, 3.5, max_neighbors, None, cell_list_atoms), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cell_list_atoms", [CELL_LIST_ATOMS, 4])
def test_random_nasty_cells(emulated: ModuleType, seed: int, cell_list_atoms: int) -> None:
    batch = batch_of([random_system(k) for k in range(40 * seed, 40 * seed + 40)])
    emulated.set_seed(seed)  # another order of the threads
    expected = radius_graph(*batch, 3.0, 12)
    assert_same(emulated_graph(emulated, batch, 3.0, 12, None, cell_list_atoms), expected)


def test_long_rows_in_small_cells(emulated: ModuleType) -> None:
    names = "one atom with its own images", "primitive fcc", "sheared, far from reduced"
    batch = batch_of([NASTY[name] for name in names])
    for max_neighbors in (None, 250):
        expected = radius_graph(*batch, 10.0, max_neighbors)
        assert_same(emulated_graph(emulated, batch, 10.0, max_neighbors), expected)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, True), (False,) * 3])
def test_bins_of_a_large_structure_among_small_ones(emulated: ModuleType, pbc: tuple[bool, ...]) -> None:
    """Atoms lie outside of the cell too, by tenths of it and by many times it; one axis has a single bin."""
    generator = torch.Generator().manual_seed(3)
    cell = torch.tensor([[11.0, 0, 0], [3, 9, 0], [-2, 1, 4]], dtype=torch.float64)
    fractions = 1.2 * torch.rand(90, 3, dtype=torch.float64, generator=generator) - 0.1
    fractions[::7] += torch.tensor([5.0, -3.0, 40.0]) * torch.tensor(pbc)
    large = system(fractions @ cell, cell, pbc)
    small = [random_system(seed) for seed in range(6)]
    batch = batch_of([*small, large, *small])
    expected = radius_graph(*batch, 2.5, 9)
    assert_same(emulated_graph(emulated, batch, 2.5, 9, None, 60), expected)


def test_every_kernel_on_few_atoms(emulated: ModuleType) -> None:
    """Small enough for a process that the thread sanitizer watches: pairs, a reduced cell, bins, long rows."""
    names = "triclinic, smaller than the cutoff", "sheared, far from reduced", "perfect rocksalt, ties everywhere"
    batch = batch_of([NASTY[name] for name in names])
    assert_same(emulated_graph(emulated, batch, 4.0, 20, None, 5), radius_graph(*batch, 4.0, 20))


def test_which_rows_are_sorted_and_how_often_the_stream_is_waited_for(emulated: ModuleType) -> None:
    """Only those of reduced cells and of cell lists; and once."""
    called: list[str] = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            called.append(function.__name__)
            return function(*arguments, **(options or {}))

    class Kernels(emulated.CudaRadiusGraph):  # type: ignore[misc, name-defined]
        def list(self, **arguments: int) -> None:
            called.append("list")
            super().list(**arguments)

    module = SimpleNamespace(CudaRadiusGraph=Kernels)
    cube, sheared = (batch_of([NASTY[name]]) for name in ("left-handed", "sheared, far from reduced"))
    for batch, max_neighbors, cell_list_atoms, listed in (
        (cube, None, CELL_LIST_ATOMS, 0),
        (cube, 5, CELL_LIST_ATOMS, 0),
        (cube, 5, 0, 1),
        (sheared, 5, CELL_LIST_ATOMS, 1),
    ):
        called.clear()
        with Calls():
            find_edges(module.CudaRadiusGraph, *batch, 6.0, max_neighbors, None, cell_list_atoms)
        assert called.count("list") == listed
        waits = "tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero", "bincount"
        assert [name for name in called if name in waits] == ["tolist"]


def test_max_images(emulated: ModuleType) -> None:
    batch = batch_of([s for s in NASTY.values() if s.num_atoms < 10])
    assert_same(emulated_graph(emulated, batch, 5.0, 9, 1), radius_graph(*batch, 5.0, 9, 1))


def test_empty_batches(emulated: ModuleType) -> None:
    for systems in ([], [NASTY["no atoms"]]):
        batch = batch_of(systems)
        assert_same(emulated_graph(emulated, batch, 3.0), radius_graph(*batch, 3.0))


ALL_OPEN = NASTY["molecule without a cell"]
BROKEN = {
    "coincident": system([[1, 1, 1], [0, 0, 0], [5.001, 1, 1]], 4 * torch.eye(3)),
    "not finite": system([[1, 1, 1], [0, torch.nan, 0]], 4 * torch.eye(3)),
    "flat cell": system([[1, 1, 1]], [[1, 0, 0], [0, 1, 0], [1, 1, 0]]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_faults_are_the_ones_of_the_cpu(emulated: ModuleType, name: str) -> None:
    batch = batch_of([NASTY["needle"], BROKEN[name], *BROKEN.values()])
    with pytest.raises(DataError) as expected:
        radius_graph(*batch, 3.0)
    with pytest.raises(DataError) as found:
        emulated_graph(emulated, batch, 3.0)
    assert str(found.value) == str(expected.value)


def test_too_many_edges(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radius_fault, "MOST_EDGES", 100)
    with pytest.raises(DataError, match="edges or more, expected fewer than 2"):
        emulated_graph(emulated, batch_of([NASTY["primitive fcc"]]), 8.0)


@pytest.mark.parametrize("offsets", [[0, 3, 2, 3], [1, 3], [0, 2], [0, 1, 7, 3], [-2, 3], [0]])
def test_offsets_that_do_not_rise_from_zero_to_n_are_refused(emulated: ModuleType, offsets: list[int]) -> None:
    _, cell, pbc, _ = batch_of([ALL_OPEN] * (len(offsets) - 1))
    with pytest.raises(ValueError, match="atom_ptr: expected offsets rising from 0 to N = 3"):
        emulated_graph(emulated, (ALL_OPEN.positions, cell, pbc, torch.tensor(offsets)), 3.0, cell_list_atoms=0)


def test_a_cell_that_is_not_finite_is_refused(emulated: ModuleType) -> None:
    positions, cell, pbc, atom_ptr = batch_of([ALL_OPEN, NASTY["needle"], ALL_OPEN])
    cell[2, 1, 1] = torch.nan  # of an open axis
    with pytest.raises(DataError, match="cell of structure 2 of the batch: expected finite numbers"):
        emulated_graph(emulated, (positions, cell, pbc, atom_ptr), 3.0)


def test_too_many_images(emulated: ModuleType) -> None:
    with pytest.raises(DataError, match="structure 0 of the batch has about inf periodic images"):
        emulated_graph(emulated, batch_of([system([[0, 0, 0]], 1e-4 * torch.eye(3))]), 3.0)


def test_the_emulation_refuses_what_a_gpu_would_get_wrong(tmp_path: Path) -> None:
    program = tmp_path / "divergence"
    source = str(EMULATION / "divergence.cpp")
    subprocess.run([COMPILER, *FLAGS, *OWN, source, "-o", str(program)], check=True)
    for kernel, complaint in ("0", "have left"), ("1", "different warp calls"), ("2", "deadlock"), ("right", ""):
        run = subprocess.run([program, kernel], capture_output=True, text=True)
        assert (run.returncode == 0) == (kernel == "right"), run.stderr
        assert complaint in run.stderr


def test_races_are_found(tmp_path: Path) -> None:
    if os.environ.get(SANITIZER):
        pytest.skip("two sanitizers do not share a process")
    program = tmp_path / "races"
    source = str(EMULATION / "races.cpp")
    subprocess.run([COMPILER, *FLAGS, "-fsanitize=thread", *OWN, source, "-o", str(program)], check=True)
    for kernel in ("0", "1", "2", "right"):
        run = subprocess.run([program, kernel], capture_output=True, text=True)
        assert (run.returncode == 0) == (kernel == "right"), run.stderr
        assert ("data race" in run.stderr) == (kernel != "right")


@pytest.mark.slow
def test_several_blocks_of_one_crystal(emulated: ModuleType) -> None:
    batch = batch_of([supercell(FCC, 3.6, 4, rattle=0.1)])
    assert_same(emulated_graph(emulated, batch, 4.0, 20), radius_graph(*batch, 4.0, 20))

"""The CUDA kernels, compiled as host C++ against tests/emulation, give the edges of the CPU kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulated import COMPILER, EMULATION, FLAGS, OWN, run_with_address_sanitizer
from systems import FCC, NASTY, batch_of, random_system, supercell, system
from torch import Tensor

from dpt_hpc.errors import DataError
from dpt_hpc.ops import RadiusGraph, radius_graph
from dpt_hpc.ops.radius_graph_cuda import find_edges


def emulated_graph(
    emulated: ModuleType,
    batch: tuple[Tensor, ...],
    cutoff: float,
    max_neighbors: int | None = None,
    max_images: int | None = None,
) -> RadiusGraph:
    return RadiusGraph(*find_edges(emulated.CudaRadiusGraph, *batch, cutoff, max_neighbors, max_images))


def assert_same(graph: RadiusGraph, expected: RadiusGraph) -> None:
    assert torch.equal(graph.target_ptr, expected.target_ptr)
    assert torch.equal(graph.edge_index, expected.edge_index)
    assert torch.equal(graph.cell_shifts, expected.cell_shifts)
    assert graph.num_truncated == expected.num_truncated


@pytest.mark.parametrize("max_neighbors", [None, 7])
def test_nasty_systems(emulated: ModuleType, max_neighbors: int | None) -> None:
    batch = batch_of([NASTY["no atoms"], *NASTY.values()])
    expected = radius_graph(*batch, 3.5, max_neighbors)
    assert expected.num_truncated > 0 or max_neighbors is None
    assert_same(emulated_graph(emulated, batch, 3.5, max_neighbors), expected)


def test_random_nasty_cells(emulated: ModuleType) -> None:
    batch = batch_of([random_system(seed) for seed in range(60)])
    assert_same(emulated_graph(emulated, batch, 3.0), radius_graph(*batch, 3.0))


def test_max_images(emulated: ModuleType) -> None:
    batch = batch_of([s for s in NASTY.values() if s.num_atoms < 10])
    assert_same(emulated_graph(emulated, batch, 5.0, 9, 1), radius_graph(*batch, 5.0, 9, 1))


def test_empty_batches(emulated: ModuleType) -> None:
    for systems in ([], [NASTY["no atoms"]]):
        batch = batch_of(systems)
        assert_same(emulated_graph(emulated, batch, 3.0), radius_graph(*batch, 3.0))


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


@pytest.mark.slow
def test_several_blocks_of_one_crystal(emulated: ModuleType) -> None:
    batch = batch_of([supercell(FCC, 3.6, 4, rattle=0.1)])
    assert_same(emulated_graph(emulated, batch, 4.0, 20), radius_graph(*batch, 4.0, 20))


@pytest.mark.slow
def test_no_address_is_wrong() -> None:
    run_with_address_sanitizer(__file__)

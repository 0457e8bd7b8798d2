"""The CUDA kernels, compiled as host C++ against tests/emulation, give the edges of the CPU kernels."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch
from systems import FCC, NASTY, batch_of, random_system, supercell, system
from torch import Tensor

from dpt_hpc.errors import DataError
from dpt_hpc.ops import RadiusGraph, radius_graph
from dpt_hpc.ops.radius_graph_cuda import find_edges

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
SANITIZED = "DPT_HPC_EMULATED_WITH_ADDRESS_SANITIZER"
FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"]


def build(sanitizers: str) -> Path:
    """The emulated module, compiled once per state of its sources."""
    sources = [*sorted((ROOT / "csrc").glob("*")), *sorted(EMULATION.glob("*"))]
    digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources) + sanitizers.encode())
    folder = ROOT / "build" / "emulation" / digest.hexdigest()[:16]
    out = folder / "emulated.so"
    if out.exists():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    system = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    own = [f"-I{path}" for path in (ROOT / "csrc", EMULATION)]
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined"]
    compile_ = [os.environ.get("CXX", "g++"), *FLAGS, *own]
    kernels, module, partial = (folder / f"{name}.{os.getpid()}" for name in ("kernels.o", "module.o", "emulated.so"))
    for command in (
        [*compile_, "-O1", "-ffp-contract=off", *sanitize, "-c", str(EMULATION / "kernels.cpp"), "-o", str(kernels)],
        [*compile_, "-O0", *system, "-c", str(EMULATION / "module.cpp"), "-o", str(module)],
        [*compile_[:1], *sanitize, "-shared", str(kernels), str(module), "-o", str(partial)],
    ):
        subprocess.run(command, check=True)
    partial.rename(out)
    return out


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    path = build("undefined,address" if os.environ.get(SANITIZED) else "undefined")
    spec = importlib.util.spec_from_file_location("emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    own = [f"-I{path}" for path in (ROOT / "csrc", EMULATION)]
    source = str(EMULATION / "divergence.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, *own, source, "-o", str(program)], check=True)
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
    """These tests once more, in a process that the address sanitizer watches."""
    if os.environ.get(SANITIZED):
        pytest.skip("this is that process")
    compiler = os.environ.get("CXX", "g++")
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    environment = os.environ | {
        SANITIZED: "1",
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

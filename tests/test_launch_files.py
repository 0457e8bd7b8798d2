"""The files of launch/ as they are, with the real launchers: each starts its ranks, says what it found, and trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from required import PROGRAMS, needs_deepspeed, needs_mpi
from small_runs import Options, of_steps

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(("number", "requeued"), [("", True), ("TERM", False)])
def test_pbs_queues_again_the_job_whose_time_is_over_and_not_the_one_that_was_deleted(
    tmp_path: Path, number: str, requeued: bool
) -> None:
    """PBS itself is not here: its qrerun, and ranks that save when told, are stood in for."""
    stand_ins = {
        "qrerun": f'echo "$1" > {tmp_path}/requeued',
        "mpiexec": f'trap "exit 75" USR1; touch {tmp_path}/started; while :; do sleep 0.1; done',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n[ "$1" = --version ] && exit\n{text}\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("localhost\n")
    job = subprocess.Popen(
        [LAUNCH / "pbs.sh"],
        env=os.environ
        | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PBS_NODEFILE": str(tmp_path / "hosts")}
        | {"PBS_O_WORKDIR": str(ROOT), "PBS_JOBID": "12.pbs", "CONFIG": "none.yaml", "REQUEUE": "yes"}
        | {"WALL_SECONDS": "600" if number else "2"},
        stdout=subprocess.DEVNULL,
    )
    if number:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        job.terminate()
    assert job.wait(60) == 75
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "12.pbs\n"


def test_deepspeeds_runners_for_several_hosts(tmp_path: Path) -> None:
    """What deepspeed is called with: its runner for Slurm takes a file, and Open MPI must know the network."""
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=2\ntwo slots=2\n")
    done = start("deepspeed.sh", "config.yaml", HOSTS=hosts, LAUNCHER="slurm", DEEPSPEED="echo")
    assert done.returncode == 0, done.stderr
    assert "--module" not in done.stdout
    program = Path(done.stdout.split()[-3])
    assert done.stdout.split()[-2:] == ["config.yaml", "--resume"]
    helped = subprocess.run(
        [sys.executable, program, "--help"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert helped.returncode == 0, helped.stderr
    assert "launch.py run" in helped.stdout
    refused = start("deepspeed.sh", "config.yaml", HOSTS=hosts, LAUNCHER="openmpi", DEEPSPEED="echo")
    assert refused.returncode == 4
    assert "names several hosts: set INTERFACE to the network between them" in refused.stderr
    told = start("deepspeed.sh", "config.yaml", HOSTS=hosts, LAUNCHER="openmpi", DEEPSPEED="echo", INTERFACE="ib0")
    assert "btl_tcp_if_include ib0" in told.stdout


@needs_deepspeed
def test_deepspeeds_launcher_with_its_local_rank(config: Path) -> None:
    trained(config, start("deepspeed.sh", config, RANKS=2), 2, "deepspeed")


@needs_mpi
@needs_deepspeed
def test_deepspeeds_launcher_with_open_mpi_and_a_host_file(config: Path) -> None:
    hosts = config.parent / "hosts"
    hosts.write_text("localhost slots=2\n")
    done = start("deepspeed.sh", config, HOSTS=hosts, LAUNCHER="openmpi")
    trained(config, done, 2, "mpirun (Open MPI)")

"""The files of launch/ as they are, with the real launchers: each starts its ranks, says what it found, and trains."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from required import MPICH, PROGRAMS, needs_deepspeed, needs_mpi, needs_mpich
from small_runs import Options, of_steps

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.glob("*.sbatch")))
def test_a_job_of_an_array_speaks_of_itself_alone(name: str) -> None:
    """Slurm takes the number of an array's last job for the whole array."""
    lines = (LAUNCH / name).read_text().splitlines()
    commands = [line for line in lines if re.search(r"\b(scancel|scontrol)\b", line) and not line.startswith("#")]
    assert all('"$job"' in line for line in commands)


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


@needs_mpich
def test_mpich_and_the_environment_that_a_site_sets(config: Path) -> None:
    """The ranks of a host file in DeepSpeed's format, which is not MPICH's."""
    hosts, site = config.parent / "hosts", config.parent / "site.sh"
    hosts.write_text("# two of\nlocalhost slots=2\n")
    site.write_text(f"MPIRUN={MPICH / 'bin' / 'mpiexec'}\nexport MPI4PY_LIBMPI={MPICH / 'lib' / 'libmpi.so.12'}\n")
    trained(config, start("mpirun.sh", config, RANKS=2, HOSTS=hosts, SITE=site), 2, "mpiexec (MPICH)")


@needs_mpi
def test_open_mpi_hands_the_environment_on_to_other_hosts(tmp_path: Path) -> None:
    """No other host is here: what mpirun is called with."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text('#!/bin/bash\n[ "$1" = --version ] && echo "mpirun (Open MPI) 5" || echo "$@"\n')
    mpirun.chmod(0o755)
    hosts, site = tmp_path / "hosts", tmp_path / "site.sh"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    site.write_text("export NCCL_SOCKET_IFNAME=ib0 EDITOR=none\n")
    done = start("mpirun.sh", "config.yaml", MPIRUN=mpirun, HOSTS=hosts, SITE=site)
    assert done.returncode == 0, done.stderr
    handed_on = {name for flag, name in itertools.pairwise(done.stdout.split()) if flag == "-x"}
    assert {"OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "PATH", "MASTER_PORT"} <= handed_on
    assert "EDITOR" not in handed_on


@needs_mpi
def test_a_host_file_of_pbs(config: Path) -> None:
    hosts = config.parent / "hosts"
    hosts.write_text("localhost\nlocalhost\n")
    variables = {"PBS_NODEFILE": hosts, "PBS_O_WORKDIR": ROOT, "CONFIG": config, "MPIEXEC": PROGRAMS / "mpiexec"}
    done = start("pbs.sh", ARGUMENTS="--set seed=3", **variables)
    trained(config, done, 2, "mpirun (Open MPI)")
    assert "2 ranks on localhost" in done.stdout
    assert yaml.safe_load((config.parent / "run" / "config.yaml").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("end", "requeued"), [("time", True), ("TERM", False), ("KILL", True), ("KILL for the last time", False)]
)
def test_pbs_queues_again_the_job_whose_time_is_over_and_not_the_one_that_was_deleted(
    tmp_path: Path, end: str, requeued: bool
) -> None:
    """PBS itself is not here: its qrerun and qstat, and ranks that save when told, are stood in for."""
    lost = end.startswith("KILL")
    stand_ins = {
        "qrerun": f'echo "$1" > {tmp_path}/requeued',
        "qstat": "echo 'Job Id: 12.pbs\n    Resource_List.walltime = 00:00:04\n    run_count = 3'",
        "mpiexec": f'trap "exit 75" USR1; touch {tmp_path}/started; echo "restarts $DPT_HPC_RESTARTS $*"\n'
        + ("kill -9 $$" if lost else "while :; do sleep 0.1; done"),
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
        | {"PBS_ARRAY_INDEX": "4", "MAX_RESTARTS": "2" if "last" in end else "3"}
        | ({"WALL_SECONDS": "600"} if end == "TERM" else {}),  # else two seconds, half of what qstat says
        stdout=subprocess.PIPE,
        text=True,
    )
    if end == "TERM":
        while not (tmp_path / "started").exists():
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        time.sleep(0.2)
        job.terminate()
    told, _ = job.communicate(timeout=60)
    assert job.returncode == (137 if lost else 75), told
    assert "restarts 2 -n 1" in told
    assert "--array 4" in told
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
    program = Path(done.stdout.split()[-5])
    assert done.stdout.split()[-4:] == ["config.yaml", "--resume", "--set", "engine.world_size=4"]
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

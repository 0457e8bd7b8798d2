"""Jobs that a queue starts again: how often in vain, as one of an array, and told to stop before the first step."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_runs import Options, config_of, finetune_options

from dpt_hpc.errors import ConfigError, EnvironmentFault, RankLost
from dpt_hpc.train.config_file import of_an_array
from dpt_hpc.train.run_dir import claim_run_dir
from dpt_hpc.train.signals import EXIT_REQUEUE
from dpt_hpc.train.starts import STARTS, count_start


def test_a_job_that_gets_nowhere_is_not_started_for_ever(finished: tuple[Options, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = {"SLURM_JOB_ID": "7"}
    for _ in range(9):  # of somebody who tries by hand, or of a queue for the first time
        count_start(run_dir, 2, {})
        count_start(run_dir, 2, job)
    assert not run_dir.exists()
    for restart in ("1", "2"):
        count_start(run_dir, 2, job | {"SLURM_RESTART_COUNT": restart})
    for name in (f".config.yaml.n1.{os.getpid()}", f".{STARTS}.n1.7"):  # of starts that were killed while writing
        (run_dir / name).touch()
    claim_run_dir(run_dir, config_of(finished[0], run_dir), resume=True)  # what is there is in nobody's way
    (run_dir / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not empty, and holds no run"):
        claim_run_dir(run_dir, config_of(finished[0], run_dir), resume=True)
    with pytest.raises(EnvironmentFault, match=r"Slurm job 7 has been started 2 times in a row without") as caught:
        count_start(run_dir, 2, job | {"SLURM_RESTART_COUNT": "3"})
    assert "(the last one: none)." in str(caught.value)
    assert "submit it anew" in str(caught.value)
    # A checkpoint, of the run or of one of its seeds, begins the count anew; so does another job.
    for place in ("", "seed_3"):
        checkpoints = run_dir / place / "checkpoints"
        (checkpoints / "step_00000004").mkdir(parents=True)
        (checkpoints / "last").symlink_to("step_00000004")
        for restart in ("4", "5"):
            count_start(run_dir, 2, job | {"SLURM_RESTART_COUNT": restart})
        with pytest.raises(EnvironmentFault, match=f"last one: .*{place}/?checkpoints/step_00000004"):
            count_start(run_dir, 2, job | {"SLURM_RESTART_COUNT": "6"})
    count_start(run_dir, 2, {"PBS_JOBID": "8.pbs", "DPT_HPC_RESTARTS": "1"})
    assert json.loads((run_dir / STARTS).read_text())["job"] == "PBS job 8.pbs"


def test_a_job_of_an_array_has_a_seed_and_a_directory_of_its_own(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    pretraining = of_an_array(config_of(finished[0], tmp_path), 3)
    assert (pretraining.seed, pretraining.run_dir) == (3, str(tmp_path / "array_3"))
    finetuning = of_an_array(finetune_options(finished[0], tmp_path), 0)
    assert (finetuning.seeds, finetuning.run_dir) == ((0,), str(tmp_path / "array_0"))


def wait_until_it_listens(pid: int) -> None:
    """Until SIGTERM would not kill this process."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def start(rank: int, ranks: int, port: int, *program: str) -> subprocess.Popen[str]:
    """As a job that was queued again, which says so in run_dir as soon as its ranks have met."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, *program],
        env=os.environ | place | {"OMP_NUM_THREADS": "1", "PBS_JOBID": "9.pbs", "DPT_HPC_RESTARTS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "seconds"), [(1, 0.5), (2, 4.0)])
def test_a_signal_before_the_first_step_ends_a_rank_soon(
    finished: tuple[Options, Path], tmp_path: Path, ranks: int, seconds: float
) -> None:
    """Alone, while it opens its data; and while it waits for another rank, for minutes."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(finished[0] | {"task": "pretrain", "run_dir": str(tmp_path / "run")}))
    process = start(0, ranks, free_port(), "-m", "dpt_hpc.launch", str(config))
    wait_until_it_listens(process.pid)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    told = process.communicate(timeout=100)[1]
    # Several: launchers send it where another one is gone.
    assert process.returncode == (EXIT_REQUEUE if ranks == 1 else RankLost.exit_code), told
    assert time.monotonic() - began < 20
    assert "stopped: told to stop (SIGTERM) before the first step: there was nothing to save." in told
    assert "Traceback" not in told


SLOW_TO_BEGIN = """
import sys, time
from dpt_hpc import launch
from dpt_hpc.train.run import Run
train = Run.train
def wait(run, *arguments, **sources):
    if run.ranks.rank == 0:
        time.sleep(12)
    train(run, *arguments, **sources)
Run.train = wait
launch.main()
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_that_are_starting_ends_both(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    """The other one hears of it by the heartbeat, or, where that has not begun, finds that the first one is gone."""
    config, program, port = tmp_path / "config.yaml", tmp_path / "slow.py", free_port()
    options = finished[0] | {"task": "pretrain", "run_dir": str(tmp_path / "run"), "engine": {"rank_timeout": 12}}
    config.write_text(yaml.safe_dump(options))
    program.write_text(SLOW_TO_BEGIN)  # or a busy machine would look at the first step
    processes = [start(rank, 2, port, str(program), str(config)) for rank in range(2)]
    while not (tmp_path / "run" / STARTS).exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    told = "".join(process.communicate(timeout=100)[1] for process in processes)
    assert [process.returncode for process in processes] == [RankLost.exit_code] * 2, told
    assert time.monotonic() - began < 25
    assert "Traceback" not in told


LONELY = """
import sys, time
from dpt_hpc.train.heartbeat import watched
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.world import find_world
with watched(Ranks(find_world()), 1.0, sys.argv[1]):
    print("here", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_launchers_only_rank_ends_with_it(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        ["bash", "-c", f'"{sys.executable}" -c "$0" {tmp_path} & wait', LONELY],
        env=os.environ | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "here\n"
    launcher.kill()
    began = time.monotonic()
    assert launcher.stdout.read() == ""  # its end: the rank, which holds the pipe, is gone
    assert time.monotonic() - began < 20

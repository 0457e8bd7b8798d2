"""Two jobs never write into one run directory; a job that is dead keeps nobody out."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small_runs import Options, of_steps, run

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.run_lock import LOCK, RunLock

HOLD = """
import sys, time
from pathlib import Path
from dpt_hpc.train.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take(0)
print("taken", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_by_name_until_the_first_is_dead(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = finished[0] | {"engine": {"rank_timeout": 5}}
    options["training"] = options["training"] | {"epochs": 1}
    run(options, run_dir)
    environment = os.environ | {"SLURM_JOB_ID": "45"}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        holder.send_signal(signal.SIGSTOP)  # stopped, it still holds the lock
        options["training"]["epochs"] = 2
        before = (run_dir / "metrics.jsonl").read_bytes()
        with pytest.raises(
            EnvironmentFault,
            match=rf"run_dir {run_dir}: another process is writing here: Slurm job 45, process {holder.pid} on "
            rf"{platform.node()}, since .*\n.*--set run_dir=DIR.* remove {run_dir}/{LOCK}",
        ):
            run(options, run_dir, resume=True)
        assert (run_dir / "metrics.jsonl").read_bytes() == before
    finally:
        holder.kill()
        holder.wait()
    run(options, run_dir, resume=True)
    assert of_steps(run_dir, "step") == list(range(1, 11))
    RunLock(run_dir).take(0)  # the run has let it go


def test_waiting_for_the_ranks_of_a_lost_job(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(EnvironmentFault):
            RunLock(tmp_path).take(0)
        killer = threading.Timer(1, holder.kill)
        killer.start()
        RunLock(tmp_path).take(60)
        killer.join()
        assert holder.wait() == -signal.SIGKILL

"""Starting ranks, for a benchmark that is not inside a launcher already: srun in a Slurm job, else mpiexec, else
torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpt_hpc.errors import EnvironmentFault

MODULE = ("-m", "dpt_hpc")


def command_for(ranks: int, arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command line that runs `dpt-hpc ARGUMENTS` on `ranks` ranks."""
    python = [sys.executable, *MODULE, *arguments]
    if "SLURM_JOB_ID" in environment and (srun := shutil.which("srun")):
        return [srun, "-n", str(ranks), *python]
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is not None:
        about = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
        # Our own pinning decides about cores; more ranks than cores are the user's to ask for.
        open_mpi = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if "Open" in about else []
        return [mpiexec, "-n", str(ranks), *open_mpi, *python]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, *MODULE, *arguments]


def start(ranks: int, arguments: Sequence[str], threads: int) -> None:
    """Run `dpt-hpc ARGUMENTS` on `ranks` ranks of `threads` threads each, and wait for them.

    Raises EnvironmentFault with the end of what they said, if they fail.
    """
    command = command_for(ranks, arguments)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        ours = [i for i, line in enumerate(lines) if line.startswith("error")]
        said = lines[ours[0] :][:6] if ours else lines[-15:]  # launchers add a page of their own
        raise EnvironmentFault(
            "\n".join([f"{ranks} rank(s): exit code {done.returncode} of {' '.join(command)}", *said])
        )

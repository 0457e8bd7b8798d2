"""One job at a time in a run directory: two would sweep away and prune each other's checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from dpt_hpc.errors import EnvironmentFault

LOCK = ".lock"
_JOB_VARIABLES = {"SLURM_JOB_ID": "Slurm job", "PBS_JOBID": "PBS job"}


def job_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """The job of a queue that this process belongs to."""
    return next((f"{word} {environment[name]}" for name, word in _JOB_VARIABLES.items() if name in environment), None)


class RunLock:
    """Holds a run directory from `take` to `release`, or to the end of this process, however it comes.

    A POSIX lock: it works over NFS and Lustre, and a dead process holds none. Where the file system has no locks, a
    warning says so.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK
        self._file: IO[str] | None = None

    def take(self, seconds: float) -> None:
        """Lock the directory, which exists; once taken, again does nothing.

        seconds: how long to wait for another process to end: the ranks of a job that was lost need theirs to find out.
        Raises EnvironmentFault that names the process.
        """
        if self._file is not None:
            return
        file = self.path.open("a+")
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    why = error.strerror or error
                    print(f"warning: {self.path}: cannot be locked ({why}): start no second job here.", file=sys.stderr)
                    break
            if time.monotonic() >= until:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise EnvironmentFault(
                    f"run_dir {self.path.parent}: another process is writing here: {holder}.\n"
                    "Two would destroy each other's checkpoints. Wait for it, end it, or choose another directory with "
                    f"--set run_dir=DIR. If its host is gone, remove {self.path}."
                )
            time.sleep(0.2)
        self._file = file
        job = f"{name}, " if (name := job_name()) else ""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(f"{job}process {os.getpid()} on {platform.node()}, since {now}")
            file.flush()

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def holder(run_dir: Path) -> str | None:
    """Which process is writing into a run directory: its own words; None if no other one is.

    Never ask while this process holds it: closing a file lets go all POSIX locks that its process has on it.
    """
    with suppress(OSError), (run_dir / LOCK).open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return file.read().strip() or "unknown"
    return None

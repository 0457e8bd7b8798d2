"""When the batch job that this process is part of ends, so that a run can say whether it is done by then."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from functools import cache

PATIENCE = 5.0
"""Seconds for squeue: a busy controller is not waited for."""


@cache
def job_end() -> float | None:
    """Seconds since the epoch at which Slurm ends this job, asked once; None outside of one, or if nobody knows."""
    return find_job_end(os.environ)


def find_job_end(environment: Mapping[str, str]) -> float | None:
    """As newer Slurms set it, else as squeue says."""
    if stated := environment.get("SLURM_JOB_END_TIME", ""):
        return float(stated) if stated.isdigit() else None
    job, squeue = environment.get("SLURM_JOB_ID"), shutil.which("squeue", path=environment.get("PATH"))
    if job is None or squeue is None:
        return None
    try:
        asked = subprocess.run(
            [squeue, "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    left = seconds_left(asked.stdout.strip())
    return None if left is None else time.time() + left


def seconds_left(said: str) -> float | None:
    """Of squeue's [days-][[hours:]minutes:]seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", said)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def told_end(seconds: float, end: float | None) -> str:
    """The clock time at which work of `seconds` will be done, and whether that is before the job ends: `end`."""
    done = datetime.now(timezone.utc).astimezone() + timedelta(seconds=seconds)
    if end is None:
        return f" ({done:%a %H:%M})"
    clock = datetime.fromtimestamp(end, timezone.utc).astimezone()
    where = "before" if done <= clock else "AFTER"
    return f" ({done:%a %H:%M}, {where} the job's end {clock:%a %H:%M})"

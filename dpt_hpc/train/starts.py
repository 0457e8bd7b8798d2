"""A job that a queue starts again and again must get on each time: else it would use up its nodes for ever."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.monitor import write_json
from dpt_hpc.train.run_lock import job_name

STARTS = ".starts.json"
RESTARTS = ("SLURM_RESTART_COUNT", "DPT_HPC_RESTARTS")
"""How often a job was queued again: Slurm says it itself, launch/pbs.sh asks PBS."""


def count_start(run_dir: Path, limit: int, environment: Mapping[str, str] = os.environ) -> None:
    """Keep account of the starts of a job that was queued again, in run_dir; one process calls it.

    limit: how many starts in a row may reach no new checkpoint. Raises EnvironmentFault beyond; a job that is submitted
    anew counts from 0.
    """
    job = job_name(environment)
    restarts = next((environment[name] for name in RESTARTS if name in environment), "0")
    if job is None or restarts in ("", "0"):
        return
    reached = _reached(run_dir)
    try:
        before = json.loads((run_dir / STARTS).read_text())
    except (OSError, ValueError):
        before = {}
    same = (before.get("job"), before.get("reached")) == (job, reached)
    fruitless = before["fruitless"] + 1 if same else 0
    if fruitless >= limit:
        raise EnvironmentFault(
            f"run_dir {run_dir}: {job} has been started {fruitless} times in a row without a new checkpoint "
            f"(the last one: {', '.join(reached) or 'none'}).\n"
            "It would use up its nodes for ever. Its output and error.log say how those starts ended: mend that, or "
            "give it more time than a start and checkpoint.every_steps take; then submit it anew."
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / STARTS, {"job": job, "reached": reached, "fruitless": fruitless})


def _reached(run_dir: Path) -> list[str]:
    """The last checkpoint of a run, or of each of its seeds."""
    links = [*run_dir.glob("checkpoints/last"), *sorted(run_dir.glob("*/checkpoints/last"))]
    return [str(link.resolve().relative_to(run_dir.resolve())) for link in links]

"""Whether a fine-tuning began from the weights that its row is about: those of its pre-training, or none."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from dpt_hpc.errors import DptError
from dpt_hpc.suite.plan import FinetuneCell
from dpt_hpc.train.checkpoint import weights_file
from dpt_hpc.train.pretrained import find_pretrained

UNRECORDED = "which weights it began from was not recorded by the early version that ran it: they were not compared"


def began_from(run_dir: Path) -> str | None:
    """SHA-256 of the weights that the fine-tuning in `run_dir` began from; None: from scratch; "": not recorded."""
    facts = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    if pretrained := facts.get("pretrained"):
        return str(pretrained["digest"])
    return "" if facts.get("pretrained_from") else None  # of an early version


def fault_of(cell: FinetuneCell, run_dir: Path) -> str | None:
    """Why the run in `run_dir` says nothing about the weights of `cell`'s start, or None if it does.

    Three lines: what is wrong, why it matters, what to do.
    """
    began, start = began_from(run_dir), cell.start
    way_out = "Its error is no result of this row.\nDelete that directory to have it run again, or restore "
    if start.cell is None:
        if began is None:
            return None
        return f"{run_dir}: the baseline begins from scratch, but it began from pre-trained weights.\n{way_out}it."
    if began is None:
        return f"{run_dir}: began from scratch, not from the pre-training {start.cell.path}.\n{way_out}it."
    try:
        checkpoint = find_pretrained(str(start.cell.path), start.epochs)
    except DptError as error:
        return f"{run_dir}: began from weights that cannot be compared: {str(error).splitlines()[0]}\n{way_out}those."
    file = weights_file(checkpoint)
    now = _digest(file, file.stat().st_mtime_ns)
    if began in ("", now):
        return None
    return (
        f"{run_dir}: began from other weights (SHA-256 {began[:12]}) than those of {start.cell.path} are now "
        f"({now[:12]}).\n{way_out}the pre-training's checkpoint."
    )


@lru_cache(maxsize=256)
def _digest(file: Path, changed: int) -> str:
    """changed: the time at which the file was written; another one is another file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()

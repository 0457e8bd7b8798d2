"""Publishing checkpoints: written by a thread while training goes on, seen under their name only when whole.

Rank 0 writes. At most one checkpoint is in flight, and the next one waits for it. Every step between two renames leaves
a directory from which the run goes on: `last` and `best` point at whole checkpoints at every moment.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.checkpoint import (
    MANIFEST,
    Snapshot,
    damage,
    load_optimizer,
    load_state,
    load_weights,
    write_checkpoint,
)
from dpt_hpc.train.config import CheckpointOptions
from dpt_hpc.train.durable import fsync

LAST, BEST = "last", "best"
_THREAD = "checkpoint"


@dataclass(frozen=True)
class Restored:
    """Where a run goes on: a whole checkpoint and what is in it.

    damaged: newer checkpoints that are not whole, by name, with what is wrong with each.
    """

    checkpoint: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    damaged: dict[str, str]


@dataclass(frozen=True)
class _Unwritten:
    name: str
    snapshot: Snapshot
    best: bool


class CheckpointWriter:
    """Writes the checkpoints of one run in the background."""

    def __init__(self, run_dir: Path, options: CheckpointOptions) -> None:
        self.directory = run_dir / "checkpoints"
        self.log = run_dir / "metrics.jsonl"
        self.options = options
        self.error: Exception | None = None
        """Why the latest checkpoint could not be written."""
        self._unwritten: list[_Unwritten] = []
        self._thread: threading.Thread | None = None

    def name(self, step: int) -> str:
        """A name that no checkpoint has yet, after those of earlier ones in order. Waits for the one in flight."""
        self.wait()
        taken = {path.name for path in self.directory.glob("step_*")} | {left.name for left in self._unwritten}
        name, again = f"step_{step:08d}", 0
        while name in taken:
            again += 1
            name = f"step_{step:08d}.{again}"
        return name

    def submit(self, name: str, snapshot: Snapshot, *, best: bool) -> None:
        """Begin to write `snapshot` as checkpoints/`name`, and point `last` (and `best`) at it in the end.

        The best one so far, where it could not be written before, is tried again first.
        """
        self.wait()
        self._unwritten = [left for left in self._unwritten if left.best and not best]
        self._unwritten.append(_Unwritten(name, snapshot, best))
        self._start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> EnvironmentFault | None:
        """Until all is written; after an error once more is tried. Returns what is wrong if it still cannot be."""
        self.wait()
        if self._unwritten:
            self._start()
            self.wait()
        return self.fault()

    def fault(self) -> EnvironmentFault | None:
        """Why the latest checkpoint could not be written, in words; None if it was."""
        error = self.error
        if error is None:
            return None
        where, why = self.directory, f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            where, why = error.filename or where, error.strerror or str(error)
        last = self.directory / LAST
        left = f"the last whole one is {last.resolve().name}" if last.exists() else "there is no earlier one"
        return EnvironmentFault(
            f"checkpoint {where}: cannot be written: {why}; {left}.\n"
            f"{_cure(error)}, then go on with --resume (checkpoint.on_error=continue trains on and tries again at the"
            " next checkpoint)."
        )

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._write, name=_THREAD)
        self._thread.start()

    def _write(self) -> None:
        try:
            while self._unwritten:
                first = self._unwritten[0]
                publish(self.directory, first.name, first.snapshot, best=first.best, log=self.log)
                self._unwritten.pop(0)
        except Exception as error:  # whatever it is: nobody else would hear of it, and the checkpoint is not there
            self.error = error
            sweep(self.directory)  # a part of a checkpoint must not keep the disk full
        else:
            self.error = None
            prune(self.directory, self.options)


def wait_for_writers(until: float) -> None:
    """Until no checkpoint of this process is being written, or the monotonic clock says `until`."""
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join(max(0.0, until - time.monotonic()))


def publish(directory: Path, name: str, snapshot: Snapshot, *, best: bool, log: Path | None = None) -> Path:
    """Write a checkpoint under a temporary name, rename it, and point `last` (and `best`) at it.

    log: what has to be on the disk before a checkpoint that counts on it.
    """
    sweep(directory)
    partial = directory / f".partial_{name}.{uuid4().hex[:8]}"  # a new name: what could not be swept is no obstacle
    write_checkpoint(partial, snapshot)
    if log is not None and log.exists():
        fsync(log)
    final = directory / name
    partial.rename(final)
    fsync(directory)
    # In this order: killed in between, the run resumes before this checkpoint and comes to the same best one.
    if best:
        point(directory, BEST, name)
    point(directory, LAST, name)
    return final


def point(directory: Path, link: str, name: str) -> None:
    """Let `link` point at the checkpoint `name`, in one step."""
    temporary = directory / f".{link}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    if (directory / link).is_dir() and not (directory / link).is_symlink():  # a copy of the run has lost its links
        (directory / link).rename(directory / f".removed_{link}.{uuid4().hex[:8]}")
    os.replace(temporary, directory / link)
    fsync(directory)


def prune(directory: Path, options: CheckpointOptions) -> None:
    """Remove all but the `keep` newest checkpoints, those of every `keep_every_epochs`-th epoch, `last` and `best`.

    What cannot be removed now is tried again after the next checkpoint: the one just written is whole all the same.
    """
    kept = {(directory / link).resolve().name for link in (LAST, BEST)}
    every = options.keep_every_epochs
    for path in sorted(directory.glob("step_*"))[: -options.keep]:
        if path.name in kept or (every and (epoch := _epoch_in_manifest(path)) and epoch % every == 0):
            continue
        with suppress(OSError):
            remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed meanwhile, it is gone under its name all the same, and `sweep` removes the rest."""
    doomed = checkpoint.with_name(f".removed_{checkpoint.name}.{uuid4().hex[:8]}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what a killed process or a full disk has left half written or half removed, as far as it can be."""
    for pattern in (".partial_*", ".removed_*"):
        for left in directory.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def has_checkpoint(directory: Path) -> bool:
    """Whether there is something to go on from, also in a copy of a run that has lost its links."""
    return (directory / LAST).is_symlink() or any(directory.glob("step_*"))


def restore(directory: Path) -> Restored | None:
    """The checkpoint to go on from: `last`, or where it is damaged the newest one that is whole; None if there is none.

    Raises EnvironmentFault if there are checkpoints and none is whole, ConfigError for one of an earlier format.
    """
    if not has_checkpoint(directory):
        return None
    last = directory / LAST
    newest = os.readlink(last) if last.is_symlink() else max(p.name for p in directory.glob("step_*"))
    if not re.fullmatch(r"step_\d+(\.\d+)?", newest):
        raise EnvironmentFault(
            f"{last}: leads to {newest}, expected a checkpoint beside it.\n"
            "Let it lead to one of step_*, or delete it: the newest whole one is taken then."
        )
    damaged: dict[str, str] = {}
    for name in [newest, *sorted((p.name for p in directory.glob("step_*") if p.name < newest), reverse=True)]:
        wrong = damage(directory / name)
        if wrong is not None:
            damaged[name] = wrong
            continue
        path = directory / name
        state = load_state(path)
        if state["best"] is not None and (state["best"] in damaged or damage(directory / state["best"]) is not None):
            state |= {"best": None, "best_loss": math.inf}  # lost: the best one from here on
        return Restored(path, load_weights(path), load_optimizer(path), state, damaged)
    raise EnvironmentFault(
        "\n".join([f"{directory}: no checkpoint is whole.", *[f"  {name}: {wrong}" for name, wrong in damaged.items()]])
        + "\nRestore one from a copy, or start a new run with --set run_dir=DIR."
    )


def go_back(restored: Restored) -> None:
    """Let the run directory be as it was when this checkpoint had been written.

    Damaged checkpoints are kept under another name; whole ones that came after it will be made again.
    """
    directory, checkpoint, best = restored.checkpoint.parent, restored.checkpoint.name, restored.state["best"]
    sweep(directory)
    if best is None:
        (directory / BEST).unlink(missing_ok=True)
    else:
        point(directory, BEST, best)
    point(directory, LAST, checkpoint)
    for name in restored.damaged:
        if (directory / name).exists():
            (directory / name).rename(_free(directory / f"damaged_{name}"))
    for path in directory.glob("step_*"):
        if path.name > checkpoint:
            remove(path)


def _cure(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM) or isinstance(error, MemoryError):
        return "Make room (disk, quota or memory)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return "Restore the directory and write access to it"
    return "Find out what is wrong with that file system, or this machine"


def _free(path: Path) -> Path:
    """`path`, or where something has that name already, the first of path.1, path.2, ... that is free."""
    numbered = (path.with_name(f"{path.name}.{again}") for again in count(1))
    return next(p for p in chain([path], numbered) if not p.exists())


def _epoch_in_manifest(checkpoint: Path) -> int | None:
    """The epoch at whose end a checkpoint was made; None for one made on the way, or a damaged one."""
    try:
        epoch: int | None = json.loads((checkpoint / MANIFEST).read_bytes())["epoch_ended"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return epoch

"""What a run says of itself: run.json, metrics.jsonl (the source of truth), TensorBoard, and a live line."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from dpt_hpc.train.durable import publish_file
from dpt_hpc.train.job import job_end, told_end

SECONDS_BETWEEN_FLUSHES = 1.0
PACKAGES = ("dpt-hpc", "torch", "numpy", "h5py", "deepspeed", "mpi4py", "safetensors")


def describe_environment() -> dict[str, Any]:
    """Command, versions, machine and commit: what a reader needs to run it again."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
        "git": _commit(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    checkout = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return None
    command = [git, "describe", "--always", "--dirty"]
    asked = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write and rename, so that a reader never sees half a file. NaN is refused by JSON: it becomes null."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    temporary.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    publish_file(temporary, path)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """A compressed npz, written and renamed like `write_json`."""
    temporary = path.with_name(f".{path.name}")
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    publish_file(temporary, path)


def finite(value: Any) -> Any:
    """`value` with None for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


class Monitor:
    """Progress of one run on rank 0; without a run directory it only speaks.

    On a terminal a bar moves; elsewhere (a Slurm file) every epoch is one line.
    """

    def __init__(self, run_dir: Path | None, total_steps: int = 0, step: int = 0, *, quiet: bool = False) -> None:
        self.total_steps = total_steps
        self._started = time.monotonic()
        self._first_step = max(step, 0)
        self.run_dir = run_dir
        self._console = Console(quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._writer: Any = None
        self._log: Any = None
        self._told = False
        self._at = (0, max(step, 0))
        if run_dir is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # half a second that other commands need not pay

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self._log = _reopened(run_dir / "metrics.jsonl", step)
        self._pending = b""
        self._flushed = time.monotonic()
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("training", total=total_steps, completed=max(step, 0), note="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line for the user."""
        self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that a quiet run prints too, to stderr; the log keeps it."""
        if self.run_dir is not None:
            print(f"warning: {text}", file=sys.stderr)
            epoch, step = self._at
            warning = {"kind": "warning", "epoch": epoch, "step": step, "time": time.time(), "text": text}
            self._write(warning, step, flush=False)

    def step(self, epoch: int, step: int, record: Mapping[str, float]) -> None:
        """After every optimiser step."""
        self._at = (epoch, step)
        self._write({"kind": "step", "epoch": epoch, "step": step, "time": time.time(), **record}, step, flush=False)
        if self._bar is not None and self._task is not None:
            note = f"loss {record['loss']:.4g}  {record['structures_per_second']:.0f} structures/s  {self.finish(step)}"
            self._bar.update(self._task, completed=step, note=note)

    def epoch(self, epoch: int, epochs: int, step: int, record: Mapping[str, Any]) -> None:
        """After every epoch (epoch 0: before the first one)."""
        self._at = (epoch, step)
        self._write({"kind": "epoch", "epoch": epoch, "step": step, "time": time.time(), **record}, step, flush=True)
        errors = "  ".join(f"{k} {v:.4g}" for k, v in record["validation"].items())
        speed = ""
        if epoch:
            speed = (
                f" | train {record['train']['loss']:.4g} | lr {record['learning_rate']:.2g} | "
                f"{record['seconds']:.1f} s, {record['structures_per_second']:.0f} structures/s, "
                f"{record['atoms_per_second']:.0f} atoms/s, "
                f"{record['data_wait']:.1%} of the time without data | imbalance {record['imbalance']['mean']:.3f} | "
                f"{self.finish(step)}"
            )
        self.say(f"epoch {epoch}/{epochs} | validation {errors}{speed}")

    def finish(self, step: int) -> str:
        """How long the run will go on, the clock time of its end, and whether the job lasts until then."""
        done = step - self._first_step
        if not done:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self.total_steps - step)
        return f"ETA {timedelta(seconds=round(seconds))}{told_end(seconds, job_end())}"

    def _write(self, record: Mapping[str, Any], step: int, flush: bool) -> None:
        if self._log is None:
            return
        self._pending += json.dumps(finite(record)).encode() + b"\n"
        try:
            for key, value in _flat(record):
                if key not in ("epoch", "step", "time", "kind") and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{record['kind']}/{key}", value, step)
        except OSError:  # of its own thread, on a full disk: metrics.jsonl has all that TensorBoard shows
            pass
        if flush or time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Hand everything said so far to the system; what a full disk does not take is kept and tried again."""
        if self._log is None:
            return
        self._flushed = time.monotonic()
        try:
            while self._pending:
                self._pending = self._pending[self._log.write(self._pending) :]
            self._writer.flush()
        except OSError as error:
            told, self._told = self._told, True  # first: the warning goes to this log, too
            if not told:
                self.warn(f"{self.run_dir}: its log cannot be written: {error.strerror}; kept, and tried again.")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self.flush()
            self._log.close()
            with suppress(OSError):
                self._writer.close()


def _reopened(path: Path, step: int) -> Any:
    """The log, open for appending, without what an interrupted run wrote after the checkpoint at `step`."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                break  # the line that was being written when the run was killed
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        publish_file(temporary, path)
    return path.open("ab", buffering=0)


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in record.items():
        found += _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found

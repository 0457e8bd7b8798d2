"""Jobs of the project's own sbatch file on the tests' Slurm cluster: submitted, watched, their ranks found."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from required import required
from slurm import Cluster, missing_programs
from small_runs import Options, records

from dpt_hpc.train.checkpoint import load_state

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "launch" / "slurm.sbatch"
MISSING = missing_programs()
REQUIRED = required("slurm")

needs_slurm = pytest.mark.skipif(
    bool(MISSING) and not REQUIRED, reason=f"{', '.join(MISSING)} not installed: apt install slurm-wlm munge"
)


class Job:
    """A submitted sbatch file: four ranks on two nodes, unless told otherwise."""

    def __init__(
        self, on: Cluster, directory: Path, options: Options, *shape: object, variables: Mapping[str, str] | None = None
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.cluster, self.directory, self.run_dir = on, directory, directory / "run"
        self.output = directory / "job.out"
        config = directory / "config.yaml"
        config.write_text(yaml.safe_dump(options | {"run_dir": str(self.run_dir)}))
        self.id = on.submit(
            *("-N2", "--ntasks-per-node=2", "-o", self.output, f"--chdir={ROOT}", *shape, SBATCH, config),
            environment={"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **(variables or {})},
        )

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def ends(self, timeout: float = 240) -> str:
        """The state in which the job ends."""
        return self.cluster.wait(self.id, timeout=timeout)

    def epochs(self) -> int:
        """The last epoch that is in the log, flushed at its end."""
        log = self.run_dir / "metrics.jsonl"
        return max((r["epoch"] for r in records(self.run_dir, "epoch")), default=-1) if log.exists() else -1

    def saved(self) -> int:
        """The step of the last checkpoint; 0 without one."""
        last = self.run_dir / "checkpoints" / "last"
        return int(load_state(last)["step"]) if last.exists() else 0

    def wait_for_epoch(self, number: int) -> None:
        while self.epochs() < number:
            time.sleep(0.05)
            assert self.cluster.facts(self.id)["JobState"] in ("PENDING", "RUNNING"), self.said

    def wait_for_checkpoint(self, after: int) -> None:
        while self.saved() <= after:
            time.sleep(0.05)
            assert self.cluster.facts(self.id)["JobState"] in ("PENDING", "RUNNING"), self.said

    def wait_for_ranks(self) -> None:
        """Until one of them is there; they have hardly begun then."""
        while not self.pids():
            time.sleep(0.05)
            assert self.cluster.facts(self.id)["JobState"] in ("PENDING", "RUNNING"), self.said

    def wait_for_restart(self, number: int, timeout: float = 60) -> None:
        """Until the job has been queued again so many times in all."""
        until = time.monotonic() + timeout
        while (facts := self.cluster.facts(self.id))["Restarts"] != str(number):
            assert time.monotonic() < until, (facts["JobState"], self.said)
            time.sleep(0.2)

    def wait_until_gone(self, pids: Mapping[int, int], timeout: float) -> float:
        """Wait until none of these ranks is left; returns the seconds that it took."""
        began = time.monotonic()
        while set(pids.values()) & set(self.pids().values()):
            assert time.monotonic() - began < timeout, self.said
            time.sleep(0.05)
        return time.monotonic() - began

    def pids(self) -> dict[int, int]:
        """The processes of its ranks that are still there."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().decode().split("\0")
                command = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if command[1:3] == [b"-m", b"dpt_hpc.launch"] and f"SLURM_JOB_ID={self.id}" in variables:
                place = next(v for v in variables if v.startswith("SLURM_PROCID="))
                found[int(place.partition("=")[2])] = int(process.name)
        return found

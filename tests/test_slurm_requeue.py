"""Which jobs of the sbatch files Slurm's nodes are given again to: real Slurm, and tasks that end as ranks may end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from slurm import Cluster
from slurm_job import ROOT, SBATCH, Job, needs_slurm
from small_runs import Options
from test_starts import wait_until_it_listens

SUITE = SBATCH.with_name("suite.sbatch")

TASK = """\
#!/bin/bash
# What the job takes for its Python. A job that was queued again has nothing left to do, but where it ends so each time.
case $ENDS in
  always) exit 75 ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then exit 0; fi
case $ENDS in
  told) trap 'echo told; exit 75' USR1 ;;
  preempted) trap 'exit 75' TERM ;;
  killed)
    if [ "$SLURM_PROCID" = 0 ]; then kill -9 $$; fi
    sleep 1
    exit 75
    ;;
esac
touch "$THERE.${SLURM_ARRAY_TASK_ID:-0}"
until [ -e "$THERE.end" ]; do sleep 0.1; done
"""
NO_NODE = """\
#!/bin/bash
# Rank 3 cannot start: its end comes when the others listen, and wait for it.
if [ "$SLURM_PROCID" = 3 ]; then
  until [ -e "$THERE" ]; do sleep 0.1; done
  exit 1
fi
exec "$REAL" "$@"
"""


def test_the_sbatch_files_queue_jobs_again_by_the_same_lines() -> None:
    first, second = (path.read_text().split("\n# --") for path in (SBATCH, SUITE))
    assert len(first) == len(second) == 3
    assert first[1] == second[1]
    assert "scontrol requeue" in first[1]


class Ended:
    """A job of `file` whose tasks end as `ends` says: see TASK."""

    def __init__(
        self, on: Cluster, directory: Path, ends: str, file: Path, *shape: object, variables: Mapping[str, str]
    ) -> None:
        name = f"{ends}_{file.stem}"
        self.cluster, self.there = on, directory / name
        task = directory / f"{name}.sh"
        task.write_text(TASK)
        task.chmod(0o755)
        self.output = directory / f"{name}_%a.out"
        self.id = on.submit(
            *("-N1", "-n1", "-o", self.output, f"--chdir={ROOT}", *shape, file, "config.yaml"),
            environment={"PYTHON": str(task), "ENDS": ends, "THERE": str(self.there), **variables},
        )

    @property
    def said(self) -> str:
        return "".join(path.read_text() for path in self.output.parent.glob(self.output.name.replace("%a", "*")))

    def wait_for(self, *tasks: int) -> None:
        """Until these tasks of the array have begun."""
        until = time.monotonic() + 60
        while not all(self.there.with_name(f"{self.there.name}.{task}").exists() for task in tasks):
            assert time.monotonic() < until, self.said
            time.sleep(0.05)

    def end(self) -> None:
        self.there.with_name(f"{self.there.name}.end").touch()

    def ended(self, task: int | None = None) -> tuple[str, str]:
        """State and number of restarts, once it has come to its end."""
        job = self.id if task is None else f"{self.id}_{task}"
        state = self.cluster.wait(job)
        return state, self.cluster.facts(job)["Restarts"]


@pytest.mark.slow
@needs_slurm
def test_a_job_is_queued_again_as_often_as_that_may_help(
    two_nodes: Cluster, finished: tuple[Options, Path], tmp_path: Path
) -> None:
    """Five jobs at once. Of two arrays the last task, which has the array's own id, is told to stop; of a suite one
    worker is killed and the other one saves; one job ends by itself with the code of all being saved, each time; and of
    one the ranks are dpt_hpc's, but one of them cannot start."""

    def job(ends: str, file: Path, *shape: object, restarts: int) -> Ended:
        return Ended(two_nodes, tmp_path, ends, file, *shape, variables={"MAX_RESTARTS": str(restarts)})

    script, listening = tmp_path / "no_node.sh", tmp_path / "listening"
    script.write_text(NO_NODE)
    script.chmod(0o755)
    lonely = Job(
        two_nodes, tmp_path / "lonely", finished[0] | {"task": "pretrain"},
        variables={"PYTHON": str(script), "REAL": sys.executable, "THERE": str(listening), "MAX_RESTARTS": "0"},
    )  # fmt: skip
    arrays = [job("told", file, "--array=0-1", restarts=0) for file in (SBATCH, SUITE)]
    always = job("always", SBATCH, restarts=1)
    killed = job("killed", SUITE, "-n2", restarts=1)
    for array in arrays:
        array.wait_for(0, 1)
        two_nodes.run("scancel", "--batch", "--signal=USR1", f"{array.id}_1")
    while len(lonely.pids()) < 3:
        assert two_nodes.facts(lonely.id)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), lonely.said
        time.sleep(0.1)
    for rank in lonely.pids().values():
        wait_until_it_listens(rank)
    listening.touch()
    for array in arrays:
        assert array.ended(1) == ("COMPLETED", "1"), array.said
        array.end()
        assert array.ended(0) == ("COMPLETED", "0"), array.said
        assert array.said.count("told\n") == 1
    assert always.ended() == ("FAILED", "1"), always.said
    assert "not queued again: it was, 1 times (MAX_RESTARTS=1)" in always.said
    assert killed.ended() == ("COMPLETED", "1"), killed.said
    assert "exit code 137" in killed.said
    assert lonely.ends() == "FAILED"
    assert "exit code 76" in lonely.said, lonely.said
    assert "not queued again: it was, 0 times (MAX_RESTARTS=0)" in lonely.said


@pytest.mark.slow
@needs_slurm
def test_a_job_that_is_preempted_is_queued_again_however_often_it_was(two_nodes: Cluster, tmp_path: Path) -> None:
    low = Ended(two_nodes, tmp_path, "preempted", SBATCH, "--exclusive", variables={"MAX_RESTARTS": "0"})
    low.wait_for(0)
    node = two_nodes.facts(low.id)["NodeList"]
    urgent = two_nodes.submit("-p", "urgent", "-w", node, "--exclusive", "-o", tmp_path / "urgent.out", "--wrap=true")
    assert two_nodes.wait(urgent) == "COMPLETED"
    assert low.ended() == ("COMPLETED", "1"), low.said
    assert "exit code 75" in low.said

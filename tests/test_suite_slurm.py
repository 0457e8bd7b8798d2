"""On a real Slurm cluster of two nodes: the workers of an array share a suite."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from slurm import Cluster
from slurm_job import ROOT, needs_slurm
from test_suite import RUNS, facts, write_suite

from dpt_hpc.suite.plan import plan_suite

pytestmark = [pytest.mark.slow, needs_slurm]


def test_the_tasks_of_an_array_run_every_cell_once(two_nodes: Cluster, small_dataset: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path, small_dataset, epochs=3)
    array = two_nodes.submit(
        f"--chdir={ROOT}", "-o", tmp_path / "%a.out", "--array=0-1", "--ntasks=2", "--cpus-per-task=1",
        ROOT / "launch" / "suite.sbatch", suite,
        environment={"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = tmp_path / "0.out", tmp_path / "1.out"
    for k in range(2):
        assert two_nodes.wait(f"{array}_{k}") == "COMPLETED", "".join(p.read_text() for p in said if p.exists())
    plan = plan_suite(suite)
    assert set(facts(plan)) == RUNS
    begun = [line for path in said for line in path.read_text().splitlines() if ": begins" in line]
    assert sorted(line.split("runs/")[1].split(":")[0] for line in begun) == sorted(RUNS)
    assert "2 worker(s) on n" in said[0].read_text()
    assert (plan.run_dir / "tables" / "tables.md").exists()

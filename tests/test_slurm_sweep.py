"""Two real Slurm nodes: the sbatch file that sweeps a job's nodes, and the doctor on both of them."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from slurm import Cluster
from slurm_job import ROOT, needs_slurm
from small_runs import Options

pytestmark = [pytest.mark.slow, needs_slurm]


def test_the_nodes_of_a_job_are_swept_and_examined(
    two_nodes: Cluster, finished: tuple[Options, Path], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(finished[0] | {"task": "pretrain", "run_dir": str(tmp_path / "run")}))
    output, examined, out = tmp_path / "sweep.out", tmp_path / "doctor.json", tmp_path / "scaling"
    place = ("-N2", "--ntasks-per-node=1", f"--chdir={ROOT}")
    variables = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUT": str(out)}
    doctor = shlex.join([sys.executable, "-m", "dpt_hpc.launch", "doctor", str(config), "--json"])
    sweep = two_nodes.submit(
        *place, "-o", output, ROOT / "launch" / "scaling.sbatch", config, "--structures", 4, "--steps", 2,
        environment=variables,
    )  # fmt: skip
    assert two_nodes.wait(sweep, timeout=300) == "COMPLETED", output.read_text()
    second = two_nodes.submit(*place, "-o", examined, f"--wrap=srun {doctor}", environment=variables)
    assert two_nodes.wait(second) == "COMPLETED", examined.read_text()
    result = json.loads((out / "scaling_weak.json").read_text())
    told = [(r["ranks"], r["nodes"], r["launched_by"].split(":")[0]) for r in result["measurements"]]
    assert told == [(1, 1, "srun"), (2, 2, "srun")]
    assert "## Prediction" in output.read_text()
    assert (out / "scaling_weak.png").exists()
    line = next(line for line in examined.read_text().splitlines() if line.startswith("{"))
    found = {f["name"]: f for f in json.loads(line)["findings"]}
    assert found["placement"]["said"].startswith("2 rank(s) on 2 node(s) by srun")
    assert found["parity"]["figures"]["relative_error"] < 1e-5
    # srun without an MPI: told, and no fault of a run that does not need one.
    assert found["one-sided get"]["figures"] == {"possible": False}
    assert {f["status"] for f in found.values()} <= {"ok", "warn"}

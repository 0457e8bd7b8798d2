"""The project's own sbatch file on a real Slurm cluster of two nodes: it trains, is stopped, loses ranks, goes on."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from slurm import Cluster, cluster, missing_programs
from small_runs import Options, records, run

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "launch" / "slurm.sbatch"
MISSING = missing_programs()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) and "slurm" not in os.environ.get("DPT_HPC_REQUIRE", "").split(),
        reason=f"{', '.join(MISSING)} not installed: apt install slurm-wlm munge",
    ),
]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def options(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Real crystals in shards of twelve; more steps than can be done before a signal arrives."""
    whole = Dataset.open(small_dataset)
    sharded = tmp_path_factory.mktemp("data") / "sharded"
    structures = [whole.get(i) for i in range(len(whole))]
    units = dict(whole.property_units)
    write_dataset(structures, sharded, provenance={}, property_units=units, shard_atoms=whole.num_atoms.sum() // 4 + 1)
    assert len(list(sharded.glob("*.h5"))) >= 4
    return {
        "task": "pretrain",
        "data": {
            "path": str(sharded),
            "split": {"train": 0.5, "validation": 0.25, "test": 0.25, "by": "structure"},
        },
        "model": {"name": "cgcnn", "cutoff": 4.0, "hidden": 16, "layers": 2, "gaussians": 12, "readout_hidden": 16},
        "training": {"epochs": 20, "batch_size": 4},
        "checkpoint": {"every_steps": 5},
        "engine": {"zero_stage": 1},
        "seed": 7,
    }


class Job:
    """A submitted sbatch file: four ranks on two nodes, unless told otherwise."""

    def __init__(self, on: Cluster, directory: Path, options: Options, *words: object, shape: tuple[str, ...] = ()):
        directory.mkdir(exist_ok=True)
        self.cluster, self.directory, self.run_dir = on, directory, directory / "run"
        self.output = directory / "job.out"
        config = directory / "config.yaml"
        config.write_text(yaml.safe_dump(options | {"run_dir": str(self.run_dir)}))
        self.id = on.submit(
            *("-N2", "--ntasks-per-node=2", "-o", self.output, f"--chdir={ROOT}", *shape, SBATCH, config, *words),
            environment={"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        )

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def ends(self, timeout: float = 240) -> str:
        """The state in which the job ends."""
        return self.cluster.wait(self.id, timeout=timeout)

    def steps(self) -> int:
        log = self.run_dir / "metrics.jsonl"
        return sum('"kind": "step"' in line for line in log.read_text().splitlines()) if log.exists() else 0

    def wait_for_step(self, number: int, timeout: float = 180) -> None:
        until = time.monotonic() + timeout
        while self.steps() < number:
            assert time.monotonic() < until, self.said
            time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(two_nodes: Cluster, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(two_nodes, tmp_path_factory.mktemp("uninterrupted"), options)
    assert job.ends() == "COMPLETED", job.said
    return job


def test_the_sbatch_file_trains_on_two_nodes(uninterrupted: Job, options: Options, tmp_path: Path) -> None:
    facts = json.loads((uninterrupted.run_dir / "run.json").read_text())
    assert (facts["world_size"], facts["launched_by"], facts["engine"]) == (4, "srun", "DeepSpeedEngine")
    assert facts["nodes"] == ["n1", "n2"]
    assert uninterrupted.steps() == 120
    assert "4 ranks on n[1-2]" in uninterrupted.said
    alone = run(options, tmp_path / "alone", engine={"kind": "torch"})
    ours, single = ([r["loss"] for r in records(path, "step")][:20] for path in (uninterrupted.run_dir, alone))
    np.testing.assert_allclose(ours, single, rtol=1e-4)

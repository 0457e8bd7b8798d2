"""The project's own sbatch file on a real Slurm cluster of two nodes: it trains, is stopped, loses ranks, goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from required import required
from slurm import Cluster, cluster, missing_programs
from small_runs import Options, of_steps, records, run, same_weights, small_options

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.train.checkpoint import load_state, load_weights

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "launch" / "slurm.sbatch"
MISSING = missing_programs()
REQUIRED = required("slurm")
KILLS = int(os.environ.get("DPT_HPC_KILLS", "3"))
PLACE = (
    "from dpt_hpc.train.world import find_world; w = find_world(); print(w.rank, w.node, w.master_address, w.source)"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(
        bool(MISSING) and not REQUIRED,
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
    return small_options(sharded) | {
        "task": "pretrain",
        "training": {"epochs": 20, "batch_size": 4},
        "checkpoint": {"every_steps": 5},
        "engine": {"zero_stage": 1},
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

    def wait_until_gone(self, timeout: float) -> float:
        """Wait until no rank is left; returns the seconds that it took."""
        began = time.monotonic()
        while self.pids():
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


@pytest.fixture(scope="module")
def uninterrupted(two_nodes: Cluster, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(two_nodes, tmp_path_factory.mktemp("uninterrupted"), options)
    assert job.ends() == "COMPLETED", job.said
    return job


def test_the_sbatch_file_trains_on_two_nodes(uninterrupted: Job, options: Options, tmp_path: Path) -> None:
    facts = json.loads((uninterrupted.run_dir / "run.json").read_text())
    assert (facts["world_size"], facts["launched_by"], facts["engine"]) == (4, "srun", "DeepSpeedEngine")
    assert facts["nodes"] == ["n1", "n2"]
    assert of_steps(uninterrupted.run_dir, "step") == list(range(1, 121))
    assert "4 ranks on n[1-2]" in uninterrupted.said
    alone = run(options, tmp_path / "alone", engine={"kind": "torch"})
    ours, single = ([r["loss"] for r in records(path, "step")][:20] for path in (uninterrupted.run_dir, alone))
    np.testing.assert_allclose(ours, single, rtol=1e-4)


def test_every_kind_of_srun_tells_the_ranks_their_place(two_nodes: Cluster) -> None:
    for kind in ("none", "pmi2", "pmix"):
        shape = ("-N2", "-n4", "--ntasks-per-node=2")
        done = two_nodes.run("srun", *shape, f"--mpi={kind}", sys.executable, "-c", PLACE)
        if kind == "pmix" and "can not load PMIx library" in done.stderr and not REQUIRED:
            continue
        source = "srun" if kind == "none" else f"srun ({kind})"
        nodes = ("n1", "n1", "n2", "n2")
        expected = [f"{rank} {node} n1 {source}" for rank, node in enumerate(nodes)]
        assert sorted(done.stdout.splitlines()) == expected, done.stderr


def test_a_job_told_to_stop_is_queued_again_and_ends_bit_equal(
    two_nodes: Cluster, options: Options, uninterrupted: Job, tmp_path: Path
) -> None:
    job = Job(two_nodes, tmp_path / "told", options)
    job.wait_for_epoch(3)
    # What the file's --signal=B:USR1@120 makes Slurm do two minutes before the end.
    two_nodes.run("scancel", "--batch", "--signal=USR1", job.id)
    assert two_nodes.wait(job.id, "PENDING", timeout=60) == "PENDING", job.said
    assert "exit code 75" in job.said
    assert 3 <= job.epochs() < 20
    assert job.ends() == "COMPLETED", job.said
    assert two_nodes.facts(job.id)["Restarts"] == "1"
    assert f"job {job.id}, start 2: 4 ranks on n[1-2]" in job.said
    assert len(json.loads((job.run_dir / "run.json").read_text())["resumed"]) == 1
    assert of_steps(job.run_dir, "step") == list(range(1, 121))
    same_weights(job.run_dir, uninterrupted.run_dir)


def test_ranks_killed_at_any_moment_lose_no_checkpoint(
    two_nodes: Cluster, options: Options, uninterrupted: Job, tmp_path: Path
) -> None:
    """kill -9 of a random rank, KILLS times in runs that save every second step: the others are gone within a minute,
    the last checkpoint is whole and no older than the one before the kill, and the run goes on from it."""
    chance = random.Random(0)
    often = options | {"checkpoint": {"every_steps": 2}}
    lost: list[str] = []
    whole = 0
    while True:
        job = Job(two_nodes, tmp_path / f"run_{whole}", often)
        if len(lost) < KILLS and job.saved() < 100:
            job.wait_for_checkpoint(after=job.saved())
            time.sleep(chance.uniform(0, 2))
            victim = chance.randrange(4)
            known, pids = job.saved(), job.pids()
            if len(pids) == 4:  # else it has come to its end meanwhile
                os.kill(pids[victim], signal.SIGKILL)
                took = job.wait_until_gone(timeout=60)
                assert job.ends(timeout=60) == "FAILED", job.said
                assert job.saved() >= known
                load_weights(job.run_dir / "checkpoints" / "last")
                lost.append(f"rank {victim} after step {known}, the others gone in {took:.1f} s")
                continue
        assert job.ends() == "COMPLETED", job.said
        same_weights(job.run_dir, uninterrupted.run_dir)
        whole += 1
        if len(lost) == KILLS:
            break
    print(f"killed: {'; '.join(lost)}")

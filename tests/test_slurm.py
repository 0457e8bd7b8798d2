"""The project's own sbatch file on a real Slurm cluster of two nodes: it trains, is stopped, loses ranks, goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from slurm import KILL_WAIT, Cluster
from slurm_job import REQUIRED, Job, needs_slurm
from small_runs import Options, of_steps, records, run, same_weights, small_options

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.train.checkpoint import load_weights
from dpt_hpc.train.config import PretrainConfig

KILLS = int(os.environ.get("DPT_HPC_KILLS", "3"))
PLACE = (
    "from dpt_hpc.train.world import find_world; w = find_world(); print(w.rank, w.node, w.master_address, w.source)"
)

pytestmark = [pytest.mark.slow, needs_slurm]


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


EARLY = """\
# Sourced by the job before it starts its ranks. The first time its end is near: Slurm sends the signal that the file
# asks for by --signal=B:USR1@120, and the ranks come after it.
if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
  scontrol update JobId="$SLURM_JOB_ID" TimeLimit=2
  sleep 100 &
  wait $! || echo "site.sh: told"
else
  scontrol update JobId="$SLURM_JOB_ID" TimeLimit=60
fi
"""


def test_a_job_told_to_stop_or_bereft_of_a_rank_is_queued_again_and_ends_bit_equal(
    two_nodes: Cluster, options: Options, uninterrupted: Job, tmp_path: Path
) -> None:
    """It is told by --signal, before its ranks are there; then while they train; then one is stopped: the timeout is
    the default."""
    site = tmp_path / "site.sh"
    site.write_text(EARLY)
    job = Job(two_nodes, tmp_path / "told", options, variables={"SITE": str(site)})
    job.wait_for_restart(1, timeout=120)
    assert "site.sh: told" in job.said
    assert "exit code 75" in job.said or "exit code 138" in job.said, job.said
    job.wait_for_epoch(3)
    two_nodes.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_restart(2)
    assert "exit code 75" in job.said.partition("start 2")[2], job.said
    assert 3 <= job.epochs() < 20
    job.wait_for_checkpoint(after=job.saved())
    pids = job.pids()
    os.kill(pids[3], signal.SIGSTOP)
    took = job.wait_until_gone(pids, timeout=70)
    assert took < PretrainConfig.model_fields["engine"].default.rank_timeout + KILL_WAIT == 65
    job.wait_for_restart(3)
    assert "exit code 76" in job.said.partition("start 3")[2], job.said
    assert "error: rank 3 on n2: no sign of life for" in job.said, job.said
    assert job.ends() == "COMPLETED", job.said
    assert f"job {job.id}, start 4: 4 ranks on n[1-2]" in job.said
    assert len(json.loads((job.run_dir / "run.json").read_text())["resumed"]) == 2
    assert of_steps(job.run_dir, "step") == list(range(1, 121))
    same_weights(job.run_dir, uninterrupted.run_dir)
    print(f"one rank stopped: the others gone in {took:.1f} s")


WHEREABOUTS = Path(__file__).with_name("whereabouts")
AIMS = ("starting", "checkpoint", "loading", "step")


def caught(job: Job, aim: str, folder: Path, chance: random.Random) -> tuple[int, dict[int, int], str] | None:
    """A rank of the job that has been killed, all that were there, and where it was; None at the end of the job.

    It is stopped first, and goes on if it has left the place meanwhile: what is told of it is so.
    """
    if aim == "starting":
        job.wait_for_ranks()
        time.sleep(chance.uniform(0, 8))
    else:
        job.wait_for_checkpoint(after=job.saved())
        time.sleep(chance.uniform(0, 2))
    while pids := job.pids():
        victim = 0 if aim == "checkpoint" else chance.choice(sorted(pids))  # rank 0 writes
        until = time.monotonic() + 2
        while time.monotonic() < until:
            if aim != "starting" and aim not in places(folder, victim):
                time.sleep(0.001)
                continue
            with suppress(ProcessLookupError):
                os.kill(pids[victim], signal.SIGSTOP)
                time.sleep(0.01)
                found = places(folder, victim)
                if aim == "starting" or aim in found:
                    os.kill(pids[victim], signal.SIGKILL)
                    return victim, pids, " and ".join(found) or "starting, or between two places"
                os.kill(pids[victim], signal.SIGCONT)
    return None


def places(folder: Path, rank: int) -> list[str]:
    """Where tests/whereabouts/sitecustomize.py says that a rank is."""
    path = folder / str(rank)
    inside = path.read_bytes() if path.exists() else b""
    return [name for name, count in zip(("step", "checkpoint", "loading"), inside, strict=False) if count]


def test_ranks_killed_at_any_moment_lose_no_checkpoint(
    two_nodes: Cluster, options: Options, uninterrupted: Job, tmp_path: Path
) -> None:
    """kill -9 of a random rank, KILLS times in runs that save every second step: while the ranks start, in a
    checkpoint, while data are loaded, in a step.

    The others are gone within a minute, the last checkpoint is whole and no older than the one before the kill, and the
    job is queued again and goes on from it.
    """
    chance = random.Random(0)
    often = options | {"checkpoint": {"every_steps": 2, "max_fruitless_starts": KILLS + 1}}
    lost: list[str] = []
    whole = 0
    while whole == 0 or len(lost) < KILLS:
        folder = tmp_path / f"whereabouts_{whole}"
        folder.mkdir()
        watched = {"PYTHONPATH": str(WHEREABOUTS), "DPT_HPC_WHEREABOUTS": str(folder)}
        job = Job(two_nodes, tmp_path / f"run_{whole}", often, variables=watched)
        restarts = 0
        while len(lost) < KILLS and job.saved() < 100:
            for file in folder.iterdir():
                file.unlink()
            aim = AIMS[len(lost) % len(AIMS)]
            known = job.saved()
            if (kill := caught(job, aim, folder, chance)) is None:  # it has come to its end meanwhile
                break
            victim, pids, where = kill
            took = job.wait_until_gone(pids, timeout=60)
            restarts += 1
            job.wait_for_restart(restarts)
            assert job.saved() >= known
            if known:
                load_weights(job.run_dir / "checkpoints" / "last")
            lost.append(f"| {len(lost) + 1} | {victim} | {aim} | {where} | {known} | {job.saved()} | {took:.1f} |")
        assert job.ends() == "COMPLETED", job.said
        same_weights(job.run_dir, uninterrupted.run_dir)
        whole += 1
    print("| kill | rank | aimed at | in | last checkpoint before | after | others gone, s |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lost))

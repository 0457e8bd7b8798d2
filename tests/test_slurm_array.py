"""On a real Slurm cluster of two nodes: an array on GPUs, DeepSpeed's launcher, and MPI over the nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from required import MPICH, needs_deepspeed, needs_mpich
from slurm import NODES, Cluster
from slurm_job import ROOT, SBATCH, Job, needs_slurm
from small_runs import Options, finetune_options, of_steps, run

pytestmark = [pytest.mark.slow, needs_slurm, needs_deepspeed]


SITE = """\
echo "GPUs ${CUDA_VISIBLE_DEVICES:-none}, ${SLURM_CPUS_PER_TASK:-1} cores"
# The last job of an array has the array's own number.
if [ "${SLURM_ARRAY_TASK_ID:-0}" = 1 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
  scancel --batch --signal=USR1 "${SLURM_ARRAY_JOB_ID}_1"
  sleep 1
fi
"""


def test_two_seeds_on_gpus_beside_ranks_of_deepspeeds_launcher(
    two_nodes: Cluster, finished: tuple[Options, Path], tmp_path: Path
) -> None:
    """Three jobs at once: two of an array, each with a GPU that Slurm counts and torch does not see, and one in which
    DeepSpeed calls srun."""
    seeds, pretraining = tmp_path / "seeds.yaml", tmp_path / "pretraining.yaml"
    config = finetune_options(finished[0], tmp_path / "seeds", pretrained=str(finished[1]))
    seeds.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    one_epoch = {"training": {"epochs": 1, "batch_size": 8}, "run_dir": str(tmp_path / "pretraining")}
    pretraining.write_text(yaml.safe_dump(finished[0] | {"task": "pretrain"} | one_epoch))
    hosts, site = tmp_path / "hosts", tmp_path / "site.sh"
    hosts.write_text("".join(f"{node} slots=1\n" for node in NODES))
    site.write_text(SITE)
    variables = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SITE": str(site), "HOSTS": str(hosts)}
    submit = (f"--chdir={ROOT}", "-o", tmp_path / "%x_%a.out")
    array = two_nodes.submit(
        *submit, "-J", "seeds", "--array=0-1", "-N1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2",
        SBATCH, seeds, environment=variables,
    )  # fmt: skip
    command = f"LAUNCHER=slurm launch/deepspeed.sh {pretraining} --set engine.zero_stage=1"
    ranks = two_nodes.submit(
        *submit, "-J", "ranks", "-N2", "--ntasks-per-node=1", f"--wrap={command}", environment=variables
    )
    for job in (f"{array}_0", f"{array}_1", ranks):
        assert two_nodes.wait(job) == "COMPLETED", "".join(path.read_text() for path in tmp_path.glob("*.out"))

    restarts = [two_nodes.facts(f"{array}_{k}")["Restarts"] for k in range(2)]
    assert restarts == ["0", "1"], "queued again is the one that was told to stop"
    summaries = [json.loads((tmp_path / "seeds" / f"array_{k}" / "results.json").read_text()) for k in range(2)]
    assert [summary["seeds"] for summary in summaries] == [[0], [1]]
    assert summaries[0]["test_mae"] != summaries[1]["test_mae"]
    for k in range(2):
        facts = json.loads((tmp_path / "seeds" / f"array_{k}" / f"seed_{k}" / "run.json").read_text())
        assert facts["launched_by"] == "srun: one process"
        said = (tmp_path / f"seeds_{k}.out").read_text()
        assert f"job {array}_{k}, start {k + 1}: 1 ranks" in said
        assert "GPUs 0, 2 cores" in said or "GPUs 1, 2 cores" in said, said

    facts = json.loads((tmp_path / "pretraining" / "run.json").read_text())
    assert (facts["launched_by"], facts["nodes"], facts["world_size"]) == ("srun", list(NODES), 2)
    assert of_steps(tmp_path / "pretraining", "step") == [1, 2, 3]


@needs_mpich
def test_each_node_holds_its_part_of_the_dataset_by_the_mpi_that_srun_starts(
    two_nodes: Cluster, finished: tuple[Options, Path], tmp_path: Path
) -> None:
    """MPI=pmi2, which the file hands to srun, and an MPI that speaks it."""
    changes: Options = {"training": {"epochs": 1, "batch_size": 8}, "engine": {"zero_stage": 2}}
    options = finished[0] | changes
    ours = options | {"task": "pretrain", "data": options["data"] | {"store": "cluster"}}
    variables = {"MPI": "pmi2", "MPI4PY_LIBMPI": str(MPICH / "lib" / "libmpi.so.12")}
    job = Job(two_nodes, tmp_path / "cluster", ours, "--ntasks-per-node=1", variables=variables)
    assert job.ends() == "COMPLETED", job.said
    facts = json.loads((job.run_dir / "run.json").read_text())
    assert (facts["launched_by"], facts["nodes"]) == ("srun (pmi2)", list(NODES))
    alone = run(options, tmp_path / "alone", engine={"kind": "torch"})
    np.testing.assert_allclose(of_steps(job.run_dir, "loss"), of_steps(alone, "loss"), rtol=1e-5)


def test_a_shape_that_the_nodes_do_not_have_is_refused_when_it_is_submitted(two_nodes: Cluster) -> None:
    """The lines of launch/README.md for GPUs, tried without being run: two GPUs a node are there, four are not."""
    shape = ("-N", "2", "--ntasks-per-node=2", "--cpus-per-task=2")
    for gpus, possible in ((2, True), (4, False)):
        tried = two_nodes.run("sbatch", "--test-only", *shape, f"--gpus-per-node={gpus}", SBATCH, "config.yaml")
        assert (tried.returncode == 0) is possible, tried.stderr

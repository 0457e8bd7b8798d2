"""Real ranks, two of them told that they are two nodes, talking over TCP: stores agree, and nothing waits for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from required import PROGRAMS, needs_mpi
from small_runs import Options, same_weights
from test_parallel import SEVERAL_RUNS, launch
from test_shards import structures, written

CLUSTER_RANKS = Path(__file__).with_name("cluster_ranks.py")


def on_two_nodes(*command: object, timeout: float) -> subprocess.CompletedProcess[str]:
    """Two ranks that are each the first of a node of its own, connected by TCP alone."""
    words: list[object] = [PROGRAMS / "mpiexec", "--map-by", ":OVERSUBSCRIBE", "--mca", "btl", "tcp,self"]
    for k, name in enumerate(("one", "two")):
        # Open MPI, which knows better, is the only one to set its local rank, at which DeepSpeed looks too.
        told = ["env", f"DPT_HPC_NODE={name}", "OMPI_COMM_WORLD_LOCAL_RANK=0"]
        words += [*([":"] if k else []), "-n", 1, *told, sys.executable, *command]
    return launch(words, timeout=timeout)


@needs_mpi
@pytest.mark.slow
def test_structures_come_from_a_node_whose_ranks_wait_in_a_collective_call(tmp_path: Path) -> None:
    """And do not without the thread that answers requests: it is ended there, and begun anew."""
    path = written(tmp_path / "d", structures(200, seed=3), shard_atoms=100)
    done = on_two_nodes(CLUSTER_RANKS, path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0, the other without its thread: 0 answers" in done.stdout
    for rank in (0, 1):
        assert f"rank {rank} fetches" in done.stdout
        assert f"rank {rank} done" in done.stdout


@needs_mpi
@pytest.mark.slow
def test_a_run_ends_with_the_same_bits_whichever_store_it_reads_from(small_dataset: Path, tmp_path: Path) -> None:
    options: Options = {
        "task": "pretrain",
        "seed": 7,
        "model": {"name": "cgcnn", "cutoff": 4.0, "hidden": 8, "layers": 1, "gaussians": 8, "readout_hidden": 8},
        "training": {"epochs": 2, "batch_size": 5},
    }
    split = {"train": 0.5, "validation": 0.25, "test": 0.25, "by": "structure"}
    configs = []
    for store in ("disk", "node", "cluster"):
        data = {"path": str(small_dataset), "store": store, "shuffle_window": 15, "split": split}
        configs.append(tmp_path / f"{store}.yaml")
        configs[-1].write_text(yaml.safe_dump(options | {"run_dir": str(tmp_path / store), "data": data}))
    done = on_two_nodes(SEVERAL_RUNS, *configs, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    same_weights(tmp_path / "disk", tmp_path / "node")
    same_weights(tmp_path / "disk", tmp_path / "cluster")

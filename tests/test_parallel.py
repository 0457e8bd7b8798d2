"""Real ranks are one rank: the same parameters after 20 steps, whichever launcher, ZeRO stage or objective."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from required import PROGRAMS, needs_deepspeed, needs_mpi, needs_torchrun
from small_runs import FALLING, Options, finetune_options, of_steps, records, run, same_weights
from taken import edges_of, told_and_taken

from dpt_hpc.data.sampler import Sampler
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import split_dataset
from dpt_hpc.models import CGCNNOptions, build_model
from dpt_hpc.train.checkpoint import load_weights
from dpt_hpc.train.config import DerivativesOptions
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.objective import build_objective
from dpt_hpc.train.ranks import Ranks

SEVERAL_RUNS = Path(__file__).with_name("several_runs.py")

STORES = ("disk", "node", "cluster")
VARIANTS: dict[str, Options] = {
    f"ZeRO {stage}, accumulation {accumulation}, {store}": {
        "engine": {"kind": "deepspeed", "zero_stage": stage},
        "training": {"grad_accumulation": accumulation},
        "data": {"store": store},
    }
    for stage in (0, 1, 2)
    for accumulation in (1, 2)
    for store in STORES
}
EDGE_BUDGET = 500
"""Less than the edges of one crystal in three, and than the share of a rank in most steps."""
BUDGET_VARIANTS: dict[str, Options] = {
    f"{name}, edge budget": {**options, "training": {**options["training"], "edge_budget": EDGE_BUDGET}}
    for k, (name, options) in enumerate(VARIANTS.items())
    if k % 3 == k // 3 % 3  # every stage with either accumulation, and a store in turn
}
BUDGET_VARIANTS["ZeRO 1, learnt budget"] = {
    "engine": {"kind": "deepspeed", "zero_stage": 1},
    "training": {"edge_budget": "auto"},
    "data": {"store": "cluster"},
}
FOUR_RANKS = {name: options for name, options in VARIANTS.items() if "cluster" in name} | BUDGET_VARIANTS
"""Four ranks on two cores are slow: every stage with either accumulation all the same, and two nodes of two ranks."""
AVERAGED = "ZeRO 1, moving average"
VARIANTS[AVERAGED] = {"engine": {"kind": "deepspeed", "zero_stage": 1}, "training": {"ema_decay": 0.8}}
FORCES_ONLY: Options = {"objective": {"kind": "derivatives", "energy_weight": 0, "stress_weight": 0}}
FORCES_ONLY_VARIANTS = {
    f"ZeRO {stage}, forces only": FORCES_ONLY | VARIANTS[f"ZeRO {stage}, accumulation 1, node"] for stage in (0, 1)
}
HEAD: Options = {"objective": {"kind": "head_denoising", "noise_scale": 0.1}}
MIXED: Options = {"objective": {"kind": "mixed"}}
DENOISING_VARIANTS = {
    f"ZeRO {stage}, {name}": objective | VARIANTS[f"ZeRO {stage}, accumulation {1 + stage}, node"]
    for stage in (0, 1)
    for name, objective in {"head": HEAD, "mixed": MIXED}.items()
}
ONE_PROCESS = {
    "energy, forces, stress": {"engine": {"kind": "deepspeed"}},
    "forces only": FORCES_ONLY | {"engine": {"kind": "deepspeed"}},
}


@pytest.fixture(scope="module")
def options(small_dataset: Path) -> Options:
    """Five epochs of 7, 7, 7 and 1 structures: two ranks never hold equal batches, and the last step of an epoch leaves
    one of them, and all but one micro-batch, without any. The learning rate falls from the third epoch on."""
    return {
        "task": "pretrain",
        "data": {
            "path": str(small_dataset),
            "split": {"train": 0.46, "validation": 0.27, "test": 0.27, "by": "structure"},
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
        "schedule": FALLING,
        "training": {"epochs": 5, "batch_size": 7},
        "seed": 7,
    }


def changed(options: Options, changes: Options) -> Options:
    """`options` with those of every group in `changes` on top."""
    merged = deepcopy(options)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def launch(command: Sequence[object], *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
    }
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def mpiexec(ranks: int, *command: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    mpi = [PROGRAMS / "mpiexec", "-n", ranks, "--map-by", ":OVERSUBSCRIBE", sys.executable]
    return launch([*mpi, *command], timeout=timeout)


def start(ranks: int, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return mpiexec(ranks, "-m", "dpt_hpc.launch", config, *arguments)


def written(path: Path, options: Options, run_dir: Path) -> Path:
    path.write_text(yaml.safe_dump(options | {"run_dir": str(run_dir)}))
    return path


def run_all(ranks: int, variants: dict[str, Options], options: Options, directory: Path) -> dict[str, Path]:
    """The run directories of all `variants`, run by one launch of `ranks` ranks; several, as if on two nodes."""
    runs = {name: directory / f"run_{i}" for i, name in enumerate(variants)}
    configs = [
        written(directory / f"{path.name}.yaml", changed(options, variants[name]), path) for name, path in runs.items()
    ]
    two_nodes = ["--two-nodes"] if ranks > 1 else []
    done = mpiexec(ranks, SEVERAL_RUNS, *two_nodes, *configs, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


def mixed(options: Options, dataset: Path) -> Options:
    """With labels on two crystals of three: in some steps a rank has none, in others nothing to denoise."""
    return changed(options, MIXED | {"data": {"path": str(dataset)}})


@pytest.fixture(scope="module")
def one_rank(options: Options, partly_labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process of plain torch, for every objective that the ranks are compared with."""
    directory = tmp_path_factory.mktemp("one_rank")
    return {
        "plain": run(options, directory / "plain"),
        AVERAGED: run(changed(options, {"training": {"ema_decay": 0.8}}), directory / "averaged"),
        "forces only": run(changed(options, FORCES_ONLY), directory / "forces_only"),
        "head": run(changed(options, HEAD), directory / "head"),
        "mixed": run(mixed(options, partly_labelled), directory / "mixed"),
    }


@pytest.fixture(scope="module")
def two_ranks(options: Options, partly_labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    denoising = {
        name: changed(variant, {"data": {"path": str(partly_labelled)}}) if "mixed" in name else variant
        for name, variant in DENOISING_VARIANTS.items()
    }
    variants = VARIANTS | BUDGET_VARIANTS | FORCES_ONLY_VARIANTS | denoising
    return run_all(2, variants, options, tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(scope="module")
def four_ranks(options: Options, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_all(4, FOUR_RANKS, options, tmp_path_factory.mktemp("four_ranks"))


def equal_runs(a: Path, b: Path) -> None:
    """Two runs took the same 20 steps, at a learning rate that fell, to the same parameters."""
    for path in (a, b):
        assert of_steps(path, "step") == list(range(1, 21))
        rates = of_steps(path, "learning_rate")
        assert rates == [0.002] * 8 + [0.001] * 4 + [0.0005] * 4 + [0.00025] * 4
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(of_steps(a, name), of_steps(b, name), rtol=1e-4, err_msg=name)
    validation = [[r["validation"]["loss"] for r in records(path, "epoch")] for path in (a, b)]
    np.testing.assert_allclose(validation[0], validation[1], rtol=1e-4)
    same_weights(a, b, within=1e-6)


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (2, 2), (4, 1)])
def test_the_budget_adds_micro_batches_to_some_steps(
    ranks: int, accumulation: int, options: Options, small_dataset: Path
) -> None:
    """What makes the variants below ones of unequal numbers of micro-batches, with crystals above the budget."""
    edges = edges_of(options, small_dataset)
    train = split_dataset(Dataset.open(small_dataset).structure_ids, (0.46, 0.27, 0.27), seed=7).train
    assert len(train) == 22
    sampler = Sampler(train, edges, 7, 7, edge_budget=EDGE_BUDGET)
    numbers = {len(sampler.parts(epoch, k, ranks, accumulation)) for epoch in range(1, 6) for k in range(4)}
    assert accumulation in numbers
    assert max(numbers) > accumulation
    assert len(sampler.above_budget()) > 0


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS | BUDGET_VARIANTS)
def test_two_ranks_equal_one(variant: str, one_rank: dict[str, Path], two_ranks: dict[str, Path]) -> None:
    path = two_ranks[variant]
    facts = json.loads((path / "run.json").read_text())
    assert (facts["world_size"], facts["engine"]) == (2, "DeepSpeedEngine")
    equal_runs(path, one_rank.get(variant, one_rank["plain"]))


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("variant", FOUR_RANKS)
def test_four_ranks_equal_one(variant: str, one_rank: dict[str, Path], four_ranks: dict[str, Path]) -> None:
    path = four_ranks[variant]
    assert json.loads((path / "run.json").read_text())["world_size"] == 4
    equal_runs(path, one_rank.get(variant, one_rank["plain"]))


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("variant", FORCES_ONLY_VARIANTS)
def test_two_ranks_equal_one_where_a_parameter_has_no_gradient(
    variant: str, one_rank: dict[str, Path], two_ranks: dict[str, Path]
) -> None:
    equal_runs(two_ranks[variant], one_rank["forces only"])


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("variant", DENOISING_VARIANTS)
def test_two_ranks_equal_one_where_structures_are_denoised(
    variant: str, one_rank: dict[str, Path], two_ranks: dict[str, Path]
) -> None:
    """By a head, whose read-out has no gradient at all; and mixed, where ranks hold labels and noise in any number."""
    equal_runs(two_ranks[variant], one_rank[variant.rpartition(" ")[2]])


@needs_mpi
@pytest.mark.slow
def test_ranks_compute_each_training_structure_once_an_epoch_and_tell_what_they_waited_for(
    options: Options, small_dataset: Path, two_ranks: dict[str, Path], four_ranks: dict[str, Path]
) -> None:
    runs = [(path, 2) for path in two_ranks.values()] + [(path, 4) for path in four_ranks.values()]
    assert len(runs) == len(VARIANTS | BUDGET_VARIANTS | FORCES_ONLY_VARIANTS | DENOISING_VARIANTS) + len(FOUR_RANKS)
    for path, ranks in runs:
        told_and_taken(path, ranks, options, small_dataset)


def test_forces_alone_give_the_output_bias_no_gradient(small_dataset: Path, options: Options) -> None:
    """What makes the test above one of parameters without a gradient."""
    objective = build_objective(
        build_model(CGCNNOptions(**options["model"])), DerivativesOptions(energy_weight=0, stress_weight=0), 0
    )
    batch = Dataset.open(small_dataset).read(np.arange(48))
    objective(batch, 1, objective.counts(batch))[0].backward()
    without = [n for n, p in objective.model.named_parameters() if p.grad is None]
    assert without == ["network.output.bias"]


@needs_mpi
@pytest.mark.slow
def test_both_engines_are_one(options: Options, one_rank: dict[str, Path], tmp_path: Path) -> None:
    """A single process under DeepSpeed gives what plain torch gives."""
    runs = run_all(1, ONE_PROCESS, options, tmp_path)
    for path in runs.values():
        assert json.loads((path / "run.json").read_text())["engine"] == "DeepSpeedEngine"
    equal_runs(runs["energy, forces, stress"], one_rank["plain"])
    equal_runs(runs["forces only"], one_rank["forces only"])


@needs_mpi
@pytest.mark.slow
def test_two_ranks_resume(options: Options, one_rank: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "two"
    two = changed(options, {"engine": {"zero_stage": 1}})
    config = written(tmp_path / "config.yaml", two, run_dir)
    first = start(2, config, "--set", "training.epochs=3")
    assert first.returncode == 0, first.stdout + first.stderr
    second = start(2, config, "--resume")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resumed at step 12" in second.stdout
    equal_runs(run_dir, one_rank["plain"])


@needs_mpi
@pytest.mark.slow
def test_two_ranks_fine_tune_as_one(
    options: Options, one_rank: dict[str, Path], small_dataset: Path, tmp_path: Path
) -> None:
    """Two seeds: two engines, one after the other, in the same processes."""
    errors = []
    for ranks in (1, 2):
        run_dir = tmp_path / f"ranks_{ranks}"
        config = finetune_options(options, run_dir, pretrained=str(one_rank["plain"]))
        if ranks == 1:
            finetune(config, Ranks(), quiet=True)
        else:
            path = written(tmp_path / "config.yaml", config.model_dump(mode="json"), run_dir)
            done = start(2, path, "--quiet")
            assert done.returncode == 0, done.stdout + done.stderr
            assert json.loads((run_dir / "seed_1" / "run.json").read_text())["world_size"] == 2
        summary = json.loads((run_dir / "results.json").read_text())
        assert summary["seeds"] == [0, 1]
        errors.append(summary["test_mae"])
        same_weights(run_dir / "seed_1", tmp_path / "ranks_1" / "seed_1", within=1e-6)
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@needs_mpi
@pytest.mark.slow
def test_a_users_mistake_is_told_once_and_ends_all_ranks(options: Options, tmp_path: Path) -> None:
    config = written(tmp_path / "config.yaml", changed(options, {"engine": {"kind": "torch"}}), tmp_path / "x")
    done = mpiexec(2, "-m", "dpt_hpc.launch", config, timeout=120)
    assert done.returncode != 0
    message = "engine.kind is torch, which serves one process, but mpirun (Open MPI) started 2"
    assert (done.stdout + done.stderr).count(message) == 1, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr


@needs_mpi
@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_job_and_is_named(options: Options, tmp_path: Path) -> None:
    """The other rank waits for it in a collective call, and must not wait for ever."""
    config = written(tmp_path / "config.yaml", options, tmp_path / "x")
    program = tmp_path / "fails_on_one_rank.py"
    program.write_text(
        "import os\n"
        "from dpt_hpc import launch\n"
        "from dpt_hpc.errors import DataError\n"
        "from dpt_hpc.train.loop import Trainer\n"
        "train_step = Trainer.train_step\n"
        "def fail(trainer, step, batches):\n"
        "    if trainer.engine.rank == 1 and trainer.step == 3:\n"
        "        raise DataError('shard 3: gone')\n"
        "    return train_step(trainer, step, batches)\n"
        "Trainer.train_step = fail\n"
        "launch.main()\n"
    )
    began = time.monotonic()
    done = mpiexec(2, program, config, timeout=200)
    assert time.monotonic() - began < 150
    assert done.returncode != 0
    assert done.stderr.count("error (rank 1 on ") == 1, done.stderr
    assert done.stderr.count("shard 3: gone") == 1, done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [pytest.param("torchrun", marks=needs_torchrun), pytest.param("deepspeed", marks=needs_deepspeed)]
)
def test_other_launchers_start_and_train(launcher: str, options: Options, tmp_path: Path) -> None:
    """Each with a port of its own, so that no other run on this machine is met."""
    run_dir = tmp_path / "run"
    config = written(tmp_path / "config.yaml", changed(options, {"training": {"epochs": 1}}), run_dir)
    arguments: dict[str, list[Any]] = {
        "torchrun": ["--nproc-per-node", 2, "--master-port", free_port(), "-m"],
        "deepspeed": ["--num_gpus", 2, "--master_port", free_port(), "--module"],
    }
    done = launch([PROGRAMS / launcher, *arguments[launcher], "dpt_hpc.launch", config])
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["world_size"], facts["engine"]) == (2, "DeepSpeedEngine")
    assert facts["launched_by"] == launcher
    assert of_steps(run_dir, "step") == [1, 2, 3, 4]
    losses = [r["validation"]["loss"] for r in records(run_dir, "epoch")]
    assert losses[1] < losses[0]
    assert load_weights(run_dir)["network.output.bias"].isfinite().all()

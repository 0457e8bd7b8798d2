"""The pre-trainings of configs/, every objective at the paper's full width, on real crystals far from equilibrium."""

from __future__ import annotations

import math
from pathlib import Path

import ase.io
import pytest
import torch
from small_runs import of_steps, records
from test_catalog_real import MIRROR, needs_mirror

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.train.checkpoint import load_weights
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.config_file import load_config
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import Ranks

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "pretrain").glob("*.yaml"))


@pytest.fixture(scope="module")
def hot_crystals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 materials at high temperature and pressure, and as many near equilibrium."""
    folder = tmp_path_factory.mktemp("hot")
    for name in ("mpf-TP", "alexandria-random-1k"):
        frames = ase.io.read(MIRROR / "pretrain" / f"{name}.xyz", ":200")
        small = [atoms for atoms in frames if 2 <= len(atoms) <= 6][:16]
        ase.io.write(folder / f"{name}.extxyz", small)
    ingest(sorted(folder.glob("*.extxyz")), folder / "data", IngestOptions())
    return folder / "data"


@needs_mirror
@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_pretraining_of_the_paper_trains_without_a_step_that_is_not_finite(
    config: Path, hot_crystals: Path, tmp_path: Path
) -> None:
    changes = {
        "data.path": str(hot_crystals),
        "run_dir": str(tmp_path / "run"),
        "data.split.train": 0.6,
        "data.split.validation": 0.2,
        "data.split.test": 0.2,
        "training.epochs": 1,
        "training.batch_size": 4,
        "training.max_skipped_steps": 0,
    }
    options = load_config(config, PretrainConfig, [f"{key}={value}" for key, value in changes.items()])
    run_dir = pretrain(options, Ranks(), quiet=True)
    assert all(map(math.isfinite, of_steps(run_dir, "loss")))
    epochs = [record["validation"]["loss"] for record in records(run_dir, "epoch")]
    assert len(epochs) == 2
    assert all(map(math.isfinite, epochs))
    assert all(bool(torch.isfinite(weight).all()) for weight in load_weights(run_dir / "checkpoints" / "last").values())

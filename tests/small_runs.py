"""How the tests of training configure, start and read small runs."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt_hpc.train.checkpoint import load_weights
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.config_file import check_config
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import Ranks

Options = dict[str, Any]

FALLING = {"patience": 0, "threshold": 0.9, "factor": 0.5}
"""A schedule that halves the learning rate after the second epoch and every later one, unless the loss falls by 90%."""


def small_options(dataset: Path) -> Options:
    """Three epochs of five steps on half of `dataset`, with a small network."""
    return {
        "data": {
            "path": str(dataset),
            "split": {"train": 0.5, "validation": 0.25, "test": 0.25, "by": "structure"},
        },
        "model": {"name": "cgcnn", "cutoff": 4.0, "hidden": 16, "layers": 2, "gaussians": 12, "readout_hidden": 16},
        "training": {"epochs": 3, "batch_size": 5},
        "checkpoint": {"every_steps": 2},
        "seed": 7,
    }


def config_of(options: Options, run_dir: Path, **changes: Any) -> PretrainConfig:
    return check_config(deepcopy(options) | {"run_dir": str(run_dir)} | changes, PretrainConfig, "test")


def run(options: Options, run_dir: Path, *, resume: bool = False, **changes: Any) -> Path:
    """Pre-train in this process; returns the run directory."""
    return pretrain(config_of(options, run_dir, **changes), Ranks(), resume=resume, quiet=True)


def finetune_options(options: Options, run_dir: Path, **changes: Any) -> FinetuneConfig:
    """One epoch and two seeds on the volume per atom, otherwise as in `options`."""
    content = deepcopy(options) | {"run_dir": str(run_dir), "task": "finetune"}
    content["objective"] = {"kind": "property", "target": "volume_per_atom"}
    content["training"]["epochs"] = 1
    del content["seed"]
    return check_config(content | {"seeds": [0, 1]} | changes, FinetuneConfig, "test")


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a run's log that are of one kind: step or epoch."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def of_steps(run_dir: Path, name: str) -> list[float]:
    """One number of every step."""
    return [r[name] for r in records(run_dir, "step")]


def same_weights(a: Path, b: Path, *, within: float = 0.0) -> None:
    """The last weights of two runs agree to `within`; 0: bit for bit."""
    first, second = (load_weights(path / "checkpoints" / "last") for path in (a, b))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        close(weight, second[name], within, name)


def close(a: Tensor, b: Tensor, within: float, name: str) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=within, msg=lambda m: f"{name}: {m}")

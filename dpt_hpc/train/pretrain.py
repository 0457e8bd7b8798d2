"""Pre-training: labels and their derivatives in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path

import torch

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.models import Scaling
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.data import open_dataset, share_split
from dpt_hpc.train.objective import build_network
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.run import Run


def prepare(
    config: PretrainConfig, ranks: Ranks, *, resume: bool = False, quiet: bool = False, command: str | None = None
) -> tuple[Run, Dataset, Split, Scaling]:
    """The run, its data and its network, before the first step. Writes nothing.

    Raises ConfigError if the directory holds another run, DataError if data and objective do not fit.
    """
    run = Run(config, config.seed, Path(config.run_dir), ranks, resume=resume, quiet=quiet, command=command)
    dataset = open_dataset(config.data, ranks)
    split = share_split(dataset, config.data, config.objective, config.seed, ranks)
    torch.manual_seed(config.seed)
    return run, dataset, split, build_network(config.model, config.objective)


def pretrain(
    config: PretrainConfig, ranks: Ranks, *, resume: bool = False, quiet: bool = False, command: str | None = None
) -> Path:
    """Run `config` to its end; returns the run directory. command: see Run.

    Raises ConfigError if the directory holds another run, DataError if data and objective do not fit.
    """
    run, dataset, split, model = prepare(config, ranks, resume=resume, quiet=quiet, command=command)
    run.train(dataset, split, model, sources={})
    return run.run_dir

"""A trainer of a run that is not to be: some structures of its data, weights that nobody keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.data import open_dataset, share_split
from dpt_hpc.train.finetune import load_pretrained
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.objective import build_network
from dpt_hpc.train.parts import target_values
from dpt_hpc.train.pretrained import find_pretrained
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.run import Run
from dpt_hpc.train.transfer import freeze


def throwaway_trainer(
    config: PretrainConfig | FinetuneConfig,
    ranks: Ranks,
    scratch: Path,
    *,
    structures: int,
    batch_size: int | None = None,
    verify: bool = False,
) -> tuple[Trainer, Dataset, Split]:
    """A trainer on `structures` training structures of `config`, its dataset, and the split of all of it. Collective.

    scratch: where it would write; nothing is written before its first checkpoint, or a step that is not finite.
    batch_size: instead of the config's. verify: hash every shard. Raises as the run would.
    """
    options = config.model_dump()
    if batch_size is not None:
        options["training"] |= {"batch_size": batch_size, "evaluation_batch_size": batch_size}
    options["run_dir"] = str(scratch)
    # A few structures: nothing is to be copied or kept for them.
    options["data"] |= {"stage": None} | ({"store": "disk"} if options["data"]["store"] == "auto" else {})
    small = type(config).model_validate(options)
    seed = small.seed if isinstance(small, PretrainConfig) else small.seeds[0]
    run = Run(small, seed, scratch, ranks, resume=False, quiet=True)
    dataset = open_dataset(small.data, ranks, verify=verify)
    if isinstance(small, FinetuneConfig):
        target_values(dataset, small.objective.target)
    split = share_split(dataset, small.data, small.objective, seed, ranks)
    # Spread over the whole: structures of one source lie side by side.
    chosen = np.linspace(0, len(split.train) - 1, min(structures, len(split.train))).astype(np.int64)
    torch.manual_seed(seed)
    model = build_network(small.model, small.objective)
    if isinstance(small, FinetuneConfig) and small.pretrained is not None:
        checkpoint = find_pretrained(small.pretrained, small.pretrained_epochs)
        load_pretrained(model, small.model, checkpoint, small.transfer.reset)
        freeze(model, small.transfer)
    few = Split(split.train[chosen], split.validation[:1], split.test[:0])
    return run.trainer(dataset, few, model, {}), dataset, split

"""Train several configs, one after the other, in one world of ranks: a launch costs more than a small run.

python several_runs.py [--two-nodes] [--nan-gradient] [--resume] CONFIG...   (by mpiexec)

--two-nodes: the first half of the ranks takes itself to be on one node, the second half on another, so that the node
and the cluster store are what they are on two. --nan-gradient: in the third step of each run, one weight's gradient on
the last rank is NaN. Each rank notes in its run directory, in batches_RANK.jsonl, which structures it computed in which
step.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from dpt_hpc.structure import Batch
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.config_file import load_any_config
from dpt_hpc.train.engine import DeepSpeedEngine
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import enter_world, leave_world

TWO_NODES, NAN_GRADIENT, RESUME = "--two-nodes", "--nan-gradient", "--resume"


def pretend() -> None:
    """Tell this rank, and DeepSpeed, which of two nodes it is on."""
    rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
    nodes = [2 * other // size for other in range(size)]
    os.environ["DPT_HPC_NODE"] = f"node {nodes[rank]}"
    os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(nodes[:rank].count(nodes[rank]))


def spoil_third_step() -> None:
    plain = DeepSpeedEngine.backward
    steps: WeakKeyDictionary[DeepSpeedEngine, int] = WeakKeyDictionary()  # ids are given again once an engine is gone

    def backward(engine: DeepSpeedEngine, loss: Tensor, last: bool) -> None:
        steps[engine] = steps.get(engine, 0) + last
        if steps[engine] == 3 and last and engine.rank == engine.world_size - 1:
            _, weight = engine.named_weights()[0]
            hook = weight.register_hook(lambda gradient: gradient * math.nan)
            plain(engine, loss, last)
            hook.remove()
        else:
            plain(engine, loss, last)

    DeepSpeedEngine.backward = backward  # type: ignore[method-assign]


def note_batches() -> None:
    plain = Trainer.train_step

    def train_step(trainer: Trainer, step: Any, batches: Sequence[Batch]) -> Any:
        found = [index for batch in batches for index in batch.structure_index.tolist()]
        with (trainer.run_dir / f"batches_{trainer.engine.rank}.jsonl").open("a") as log:
            print(json.dumps({"epoch": trainer.epoch, "step": step.number, "structures": found}), file=log)
        return plain(trainer, step, batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    note_batches()
    if TWO_NODES in sys.argv:
        pretend()
    if NAN_GRADIENT in sys.argv:
        spoil_third_step()
    ranks = enter_world()
    for config in (argument for argument in sys.argv[1:] if not argument.startswith("--")):
        print(f"== {config}", flush=True)
        options = load_any_config(config)
        if isinstance(options, PretrainConfig):
            pretrain(options, ranks, quiet=True, resume=RESUME in sys.argv)
        else:
            finetune(options, ranks, quiet=True, resume=RESUME in sys.argv)
    leave_world()

"""`--check`: all that a run does before its first checkpoint, a few steps included, and how long it would take."""

from __future__ import annotations

import math
import os
import shutil
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.shared_memory import status_bytes
from dpt_hpc.data.store_choice import choose_store
from dpt_hpc.data.store_node import size_of
from dpt_hpc.doctor.examine import checkpoint_bytes
from dpt_hpc.doctor.files import nearest_that_exists
from dpt_hpc.doctor.throwaway import throwaway_trainer
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.budget import memory_of
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.counting import count_edges
from dpt_hpc.train.engine import choose_device
from dpt_hpc.train.failures import DivergedError
from dpt_hpc.train.job import job_end, told_end
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.run_dir import claim_run_dir

STRUCTURES_OF_A_RANK = 8
"""Of a step on the CPU, where a whole one may take a minute: time and memory are those of as many, times the rest."""
STEPS = 4
"""At most; the first one warms up, and does not count where there is another."""
SECONDS = 8.0
"""After which no further step begins."""


def rehearse(config: PretrainConfig | FinetuneConfig, ranks: Ranks, *, resume: bool = False) -> dict[str, Any]:
    """Figures of the run that `config` describes, from a few of its steps on weights that are thrown away. Collective.

    Hashes the data, splits them, builds network and optimiser, reads the pre-trained weights, and trains; leaves
    nothing behind. resume: the run directory may hold the run. Raises what the run itself would raise, and
    EnvironmentFault for a run directory that cannot be written or has no room.
    """
    run_dir = Path(config.run_dir)
    claim_run_dir(run_dir, config, resume=resume)
    above = nearest_that_exists(run_dir)
    scratch = above / f".dpt_hpc_check_{ranks.broadcast(uuid.uuid4().hex[:8])}"
    batch = tried = config.training.batch_size
    if choose_device(config.engine, ranks.world).type == "cpu":
        tried = min(batch, STRUCTURES_OF_A_RANK * ranks.size)
    trainer, dataset, split = throwaway_trainer(
        config, ranks, scratch, structures=STEPS * tried, batch_size=tried, verify=True
    )
    weights = sum(p.numel() for p in trainer.objective.parameters())
    room, need = shutil.disk_usage(above).free, checkpoint_bytes(config, weights)
    _check_place(run_dir, above, room, need)
    try:
        edges = count_edges(trainer.objective.model, trainer.data, ranks, scratch).edges
        memory = memory_of(trainer.engine.device, ranks)
        before = status_bytes("VmRSS") if trainer.engine.device.type == "cpu" else 0
        seconds = _steps(trainer, ranks) * batch / tried
    finally:
        trainer.data.store.close()
        if ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    # A micro-batch of the run has as many more edges as its batch has structures, but no more than the budget.
    per_part = max(float(edges.mean()) * tried / (ranks.size * config.training.grad_accumulation), 1.0)
    budget = config.training.edge_budget
    grows = max(min(batch / tried, budget / per_part if isinstance(budget, int) else math.inf), 1.0)
    store, data_bytes = _store(config, trainer, dataset, ranks)
    steps = math.ceil(len(split.train) / batch)
    epoch = seconds * (steps + len(split.validation) / batch)
    seeds = len(config.seeds) if isinstance(config, FinetuneConfig) else 1
    total = epoch * config.training.epochs * seeds
    return {
        "run_dir": config.run_dir,
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "elements": len(dataset.elements),
        "weights": weights,
        "engine": type(trainer.engine).__name__,
        "device": str(trainer.engine.device),
        "ranks": ranks.size,
        "edges_per_structure": float(edges.mean()),
        "structures_tried": tried,
        "store": store,
        "data_bytes": data_bytes,
        "memory_bytes": max(ranks.all_gather(before + round(grows * memory.taken()))),
        "free_memory_bytes": min(ranks.all_gather(before + memory.room)),
        "checkpoint_bytes": need,
        "free_disk_bytes": room,
        "seconds_per_step": seconds,
        "steps_per_epoch": steps,
        "seconds_per_epoch": epoch,
        "epochs": config.training.epochs,
        "seeds": seeds,
        "seconds": total,
        "job_ends": job_end() if ranks.rank == 0 else None,  # thousands of ranks would ask Slurm
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What `rehearse` has found, for people."""
    memory, free = found["memory_bytes"], found["free_memory_bytes"]
    tight = "; MORE than there is: set training.edge_budget=auto" if memory > free else ""
    seeds = f" of each of {found['seeds']} seeds" if found["seeds"] > 1 else ""
    end = told_end(found["seconds"], found["job_ends"])
    return [
        f"data      {found['train']} / {found['validation']} / {found['test']} structures to train, validate, test; "
        f"{found['elements']} elements; about {found['edges_per_structure']:,.0f} edges each; every shard is whole",
        f"network   {found['weights']:,} weights; {found['engine']} on {found['device']}, {found['ranks']} rank(s)",
        f"memory    about {memory / 1e9:.2f} of {free / 1e9:.1f} GB a rank in a step{tight}; data: "
        f"{found['data_bytes'] / 1e6:.1f} MB, data.store is {found['store']}",
        f"disk      {found['checkpoint_bytes'] / 1e6:.0f} MB for checkpoints in {found['run_dir']}, "
        f"{found['free_disk_bytes'] / 1e9:.1f} GB free",
        f"time      {found['seconds_per_step']:.3g} s a step (by {found['structures_tried']} structures at a time), "
        f"{found['steps_per_epoch']} steps and about "
        f"{_span(found['seconds_per_epoch'])} an epoch; {found['epochs']} epochs{seeds}: about "
        f"{_span(found['seconds'])}{end}",
        "ready: nothing was written; start it with the same command without --check",
    ]


def _store(
    config: PretrainConfig | FinetuneConfig, trainer: Trainer, dataset: Dataset, ranks: Ranks
) -> tuple[str, int]:
    """Where the run would keep its data, and how many bytes they take there."""
    dtype = next(trainer.objective.parameters()).dtype
    layout = dataset.layout(dtype, getattr(config.objective, "target", None))
    kind: str = config.data.store
    if kind == "auto":
        kind = choose_store(dataset, layout, config.data.memory, ranks, ranks.node)
    return kind, size_of(dataset, layout, range(len(dataset)))[0]


def _steps(trainer: Trainer, ranks: Ranks) -> float:
    """Mean seconds of a step. Collective.

    Raises DivergedError for a step that is not finite, EnvironmentFault for one that does not fit into a GPU's memory.
    """
    trainer.objective.train()
    taken: list[float] = []
    began = time.monotonic()
    with trainer.load() as loader:
        for step, batches in loader:
            start = time.monotonic()
            try:
                trainer.train_step(step, batches)
            except torch.OutOfMemoryError:
                size = trainer.config.training.batch_size
                raise EnvironmentFault(
                    f"rank {ranks.rank}: a step of {size} structures does not fit into the GPU's memory.\n"
                    "Set training.edge_budget=auto, which divides it, or training.batch_size lower."
                ) from None
            taken.append(time.monotonic() - start)
            if trainer.divergence.skipped:
                raise DivergedError(
                    "a step of the first ones was not finite (above).\n"
                    "Look at the labels with `dpt-hpc inspect`, or lower optimizer.learning_rate."
                )
            if len(taken) == STEPS or ranks.broadcast(time.monotonic() - began > SECONDS):
                break
    counted = taken[1:] or taken
    return max(ranks.all_gather(sum(counted) / len(counted)))


def _check_place(run_dir: Path, above: Path, room: int, need: int) -> None:
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise EnvironmentFault(
            f"run_dir {run_dir}: cannot be made: {above} {'cannot be written' if above.is_dir() else 'is a file'}.\n"
            "Get write access there, or choose another place with --set run_dir=DIR."
        )
    if room < need:
        raise EnvironmentFault(
            f"run_dir {run_dir}: {room / 1e6:.0f} MB free, {need / 1e6:.0f} MB needed for checkpoints.\n"
            "Make room, lower checkpoint.keep, or choose another place with --set run_dir=DIR."
        )


def _span(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))

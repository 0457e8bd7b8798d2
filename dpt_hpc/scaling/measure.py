"""Steps of a real run, measured on the ranks that are there: how long, and where the time goes."""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpt_hpc.errors import ConfigError
from dpt_hpc.scaling.predict import Mode
from dpt_hpc.stopwatch import Stopwatch
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.interconnect import measure_all_reduce
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.monitor import Monitor, describe_environment
from dpt_hpc.train.pretrain import prepare
from dpt_hpc.train.ranks import Ranks

PARTS = ("data", "graph", "forward", "backward", "update", "all-reduce", "imbalance", "other")
"""Of a step, exclusive of each other. imbalance: waiting for the slowest rank, before a sum over ranks can begin."""

FEWER = 8
"""A single rank is measured with this many times fewer structures too: what does not shrink with them is fixed cost."""

Record = dict[str, Any]


class _Enough(Exception):
    """The last step that was wanted is done."""


class _StepClock(Monitor):
    """Stands in for a run's monitor: told of every step, it takes the time. Every other step after the warm-up runs
    under a stopwatch, whose own waits (one barrier before each sum) then stretch no step that counts as speed."""

    def __init__(self, trainer: Trainer, warm_up: int, steps: int) -> None:
        super().__init__(None, quiet=True)
        cuda = trainer.engine.device.type == "cuda"
        self._settle: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
        self._left = -warm_up
        self._steps = 2 * steps
        self._watch: Stopwatch | None = None
        self._stack = ExitStack()
        self._work = {"edges": 0, "atoms": 0, "structures": 0}
        self.records: list[Record] = []
        trainer.objective.model.register_forward_pre_hook(self._count)
        self._start()

    def _count(self, _: Any, arguments: tuple[Any, ...]) -> None:
        atomic_numbers, edge_vectors, _graph, atom_ptr = arguments
        self._work["edges"] += len(edge_vectors)
        self._work["atoms"] += len(atomic_numbers)
        self._work["structures"] += len(atom_ptr) - 1

    def _start(self) -> None:
        self._settle()
        if self._left >= 0 and self._left % 2:
            self._watch = self._stack.enter_context(Stopwatch(self._settle).run())
        self._work = dict.fromkeys(self._work, 0)
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def step(self, epoch: int, step: int, record: Mapping[str, float]) -> None:
        self._settle()
        taken: Record = {"seconds": time.perf_counter() - self._began, "cpu_seconds": time.process_time() - self._cpu}
        self._stack.close()
        if self._left >= 0:
            if self._watch is not None:
                taken |= {"parts": dict(self._watch.seconds), "counts": dict(self._watch.counts)}
            self.records.append(taken | self._work)
        self._watch = None
        self._left += 1
        if self._left == self._steps:
            raise _Enough
        self._start()


def measure(
    config: PretrainConfig, mode: Mode, structures: int, ranks: Ranks, scratch: Path, *, warm_up: int, steps: int
) -> tuple[Record, NDArray[np.int64]]:
    """Measure `steps` steps of `config` twice (plain, and by parts) on these ranks; every rank calls it.

    structures: of a step, of each rank (weak) or of all together (strong). scratch: a directory that all ranks see,
    for one checkpoint; removed. Returns the record, the same on every rank, and the edges of each structure
    that is trained on. Raises ConfigError if the training part has
    fewer structures than a step.
    """
    batch_size = structures * (ranks.size if mode == "weak" else 1)
    load = os.getloadavg()
    trainer = _trainer(config, batch_size, ranks, scratch)
    own = _steps(trainer, warm_up, steps)
    everyone = ranks.all_gather({"rank": ranks.rank, "node": ranks.world.node, "steps": own})
    small: list[Record] = []
    if ranks.size == 1 and batch_size > 1:
        small = _steps(_trainer(config, max(batch_size // FEWER, 1), ranks, scratch), 1, steps)
    checkpoint = _checkpoint(trainer, ranks, scratch)
    facts = describe_environment()
    sizes = trainer.sampler.edges[trainer.sampler.indices]
    record = {
        "mode": mode,
        "ranks": ranks.size,
        "nodes": ranks.world.num_nodes,
        "launched_by": ranks.world.source,
        "structures": batch_size,
        "structures_per_rank": batch_size / ranks.size,
        "steps": steps,
        "engine": type(trainer.engine).__name__,
        "zero_stage": config.engine.zero_stage,
        "device": str(trainer.engine.device.type),
        "threads": torch.get_num_threads(),
        "load_before": [round(value, 2) for value in load],
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "command": _command(),
        "processor": _processor(),
        **{key: facts[key] for key in ("versions", "git", "cores", "gpu")},
        **_summary(everyone),
        "work": [
            {"edges": r["edges"], "seconds": sum(r["parts"].values()) - r["parts"].get("data", 0.0)}
            for r in [*own, *small]
            if "parts" in r
        ],
        "checkpoint": checkpoint,
        "network": measure_all_reduce(ranks, trainer.engine.device),
        "parameters": sum(p.numel() for p in trainer.objective.parameters()),
        "dataset": {"structures": len(sizes), "edges": int(sizes.sum()), "bytes": _bytes_of(config)},
    }
    return record, sizes


def _trainer(config: PretrainConfig, batch_size: int, ranks: Ranks, scratch: Path) -> Trainer:
    options = config.model_dump()
    options["run_dir"] = str(scratch)
    options["training"]["batch_size"] = batch_size
    options["checkpoint"]["every_steps"] = None
    config = PretrainConfig.model_validate(options)
    run, dataset, split, model = prepare(config, ranks, quiet=True)
    if batch_size > len(split.train):
        raise ConfigError(
            f"a step of {ranks.size} rank(s) needs {batch_size} structures, but the training part has "
            f"{len(split.train)}.\nGive --structures (of a step of one rank), or a larger dataset."
        )
    trainer = run.trainer(dataset, split, model, {})
    trainer.objective.train()
    return trainer


def _steps(trainer: Trainer, warm_up: int, steps: int) -> list[Record]:
    clock = _StepClock(trainer, warm_up, steps)
    try:
        while True:
            trainer.train_epoch(clock)
            trainer.epoch, trainer.step_in_epoch = trainer.epoch + 1, 0
    except _Enough:
        return clock.records


def _checkpoint(trainer: Trainer, ranks: Ranks, scratch: Path) -> Record:
    """Seconds for which a checkpoint holds up the slowest rank, those until it is on the disk, and its bytes."""
    monitor = Monitor(None, quiet=True)
    ranks.barrier()
    began = time.perf_counter()
    trainer.save(monitor, best=False)
    held = time.perf_counter() - began
    if ranks.rank == 0 and (fault := trainer.writer.finish()):
        raise fault
    written = time.perf_counter() - began
    ranks.barrier()
    size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()) if ranks.rank == 0 else 0
    held, written, size = (max(values) for values in zip(*ranks.all_gather((held, written, size)), strict=True))
    if ranks.rank == 0:
        shutil.rmtree(scratch)
    ranks.barrier()
    return {"held_seconds": held, "written_seconds": written, "bytes": size}


def _summary(everyone: list[Record]) -> Record:
    """What all ranks' steps amount to."""
    by_step = list(zip(*[share["steps"] for share in everyone], strict=True))
    plain = [step for step in by_step if "parts" not in step[0]]
    watched = [step for step in by_step if "parts" in step[0]]
    seconds = [max(r["seconds"] for r in step) for step in plain]
    edges = [sum(r["edges"] for r in step) for step in plain]
    structures = sum(r["structures"] for step in plain for r in step)
    loads = [[r["edges"] for r in step] for step in by_step]
    counts: dict[str, float] = {}
    for step in watched:
        for name, count in step[0]["counts"].items():
            counts[name] = counts.get(name, 0.0) + count / len(watched)
    return {
        "seconds_per_step": statistics.fmean(seconds),
        "median_seconds_per_step": statistics.median(seconds),
        "spread": statistics.stdev(seconds) / statistics.fmean(seconds) if len(seconds) > 1 else math.nan,
        "cpu_share": sum(r["cpu_seconds"] for s in plain for r in s) / sum(r["seconds"] for s in plain for r in s),
        "structures_per_second": structures / sum(seconds),
        "edges_per_second": sum(edges) / sum(seconds),
        "edges_per_step": statistics.fmean(edges),
        "edge_imbalance": statistics.fmean(max(load) * len(load) / max(sum(load), 1) for load in loads),
        "watched_seconds_per_step": statistics.fmean(max(r["seconds"] for r in step) for step in watched),
        "watched_edges_per_step": statistics.fmean(sum(r["edges"] for r in step) for step in watched),
        "per_rank": [
            {
                "rank": share["rank"],
                "node": share["node"],
                "edges_per_step": statistics.fmean(r["edges"] for r in share["steps"]),
                "parts": {
                    part: statistics.fmean(r["parts"].get(part, 0.0) for r in share["steps"] if "parts" in r)
                    for part in PARTS
                },
            }
            for share in everyone
        ],
        "counts": counts,
    }


def _bytes_of(config: PretrainConfig) -> int:
    return sum(path.stat().st_size for root in config.data.path for path in Path(root).glob("shard_*.h5"))


def _command() -> str:
    """What was typed, with the names of files alone: where they lie is the machine's own affair."""
    words = (word.rpartition("=") for word in [Path(sys.argv[0]).name, *sys.argv[1:]])
    return " ".join(f"{key}{equals}{Path(value).name if '/' in value else value}" for key, equals, value in words)


def _processor() -> str:
    """Its name, as Linux has it."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = (line.split(":", 1)[1].strip() for line in about.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())

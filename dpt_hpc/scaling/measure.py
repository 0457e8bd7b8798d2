"""Steps of a real run, measured on the ranks that are there: how long, and where the time goes."""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpt_hpc.errors import ConfigError
from dpt_hpc.scaling.predict import Mode
from dpt_hpc.stopwatch import Stopwatch
from dpt_hpc.train.config import PretrainConfig, RunConfig
from dpt_hpc.train.counting import count_edges, needs_counts
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


class _StepClock:
    """Takes the time of steps. Every other one after the warm-up runs under a stopwatch, whose own waits (one barrier
    before each sum) then stretch no step that counts as speed."""

    def __init__(self, trainer: Trainer, warm_up: int, steps: int) -> None:
        cuda = trainer.engine.device.type == "cuda"
        self._settle: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
        self._taken = -warm_up
        self._wanted = 2 * steps
        self._work = {"edges": 0, "atoms": 0, "structures": 0}
        self.records: list[Record] = []
        trainer.objective.model.register_forward_pre_hook(self._count)

    @property
    def done(self) -> bool:
        """Whether the last step that was wanted has been taken."""
        return self._taken == self._wanted

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a whole step, from the wait for its data on."""
        watch = Stopwatch(self._settle) if self._taken >= 0 and self._taken % 2 else None
        self._work = dict.fromkeys(self._work, 0)
        self._settle()
        began, cpu = time.perf_counter(), time.process_time()
        with watch.run() if watch else nullcontext():
            yield
            self._settle()
        taken: Record = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        if watch:
            taken |= {"parts": dict(watch.seconds), "counts": dict(watch.counts)}
        if self._taken >= 0:
            self.records.append(taken | self._work)
        self._taken += 1

    def _count(self, _: Any, arguments: tuple[Any, ...]) -> None:
        atomic_numbers, edge_vectors, _graph, atom_ptr = arguments
        self._work["edges"] += len(edge_vectors)
        self._work["atoms"] += len(atomic_numbers)
        self._work["structures"] += len(atom_ptr) - 1


def measure(
    config: PretrainConfig, mode: Mode, structures: int, ranks: Ranks, scratch: Path, *, warm_up: int, steps: int
) -> tuple[Record, NDArray[np.int64]]:
    """Measure `steps` steps of `config` twice (plain, and by parts) on these ranks; every rank calls it.

    A single rank too has DeepSpeed's engine, whatever the config says: else what DeepSpeed costs would be taken for a
    loss of scaling. structures: of a step, of each rank (weak) or of all together (strong). scratch: a directory that
    all ranks see, for one checkpoint; removed. Returns the record, the same on every rank, and the counted edges of
    each structure that is trained on. Raises ConfigError if the training part has fewer structures than a step,
    EnvironmentFault if the checkpoint cannot be written.
    """
    batch_size = structures * (ranks.size if mode == "weak" else 1)
    load = os.getloadavg()
    trainer = _trainer(config, batch_size, ranks, scratch)
    with trainer.data.store:
        own = _steps(trainer, warm_up, steps)
        checkpoint = _checkpoint(trainer, ranks, scratch)
        network = measure_all_reduce(ranks, trainer.engine.device)
        sizes = trainer.sampler.edges[trainer.sampler.indices]
        if not needs_counts(trainer.config, ranks):  # estimated: good enough for a run, not to predict from
            sizes = count_edges(trainer.objective.model, trainer.data, ranks, scratch).edges
    everyone = ranks.all_gather({"rank": ranks.rank, "node": ranks.world.node, "steps": own})
    small: list[Record] = []
    if ranks.size == 1 and batch_size > 1:
        smaller = _trainer(config, max(batch_size // FEWER, 1), ranks, scratch)
        with smaller.data.store:
            small = _steps(smaller, 1, steps)
    facts = describe_environment()
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
            {
                "edges": r["edges"],
                "seconds": sum(r["parts"].values()) - r["parts"].get("data", 0.0),
                "cpu_seconds": r["cpu_seconds"],
            }
            for r in [*own, *small]
            if "parts" in r
        ],
        "checkpoint": checkpoint,
        "network": network,
        "parameters": sum(p.numel() for p in trainer.objective.parameters()),
        "dataset": {
            "structures": len(sizes),
            "edges": int(sizes.sum()),
            "all_structures": len(trainer.data.dataset),
            "bytes": _bytes_of(config),
            "digests": [manifest.digest for manifest in trainer.data.dataset.manifests],
        },
        "store": trainer.data.store.kind,
        "options": _options_of(trainer.config),
    }
    return record, sizes


def _trainer(config: PretrainConfig, batch_size: int, ranks: Ranks, scratch: Path) -> Trainer:
    options = config.model_dump()
    options["run_dir"] = str(scratch)
    options["training"]["batch_size"] = batch_size
    options["checkpoint"]["every_steps"] = None
    options["engine"]["kind"] = "deepspeed"
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
    """The records of two times `steps` steps; no thread of a loader is left behind."""
    clock = _StepClock(trainer, warm_up, steps)
    trainer.budget.watch()
    while not clock.done:
        if trainer.step_in_epoch == trainer.sampler.steps_per_epoch:
            trainer.epoch, trainer.step_in_epoch = trainer.epoch + 1, 0
        with trainer.load() as loader:
            ahead = iter(loader)
            while not clock.done and trainer.step_in_epoch < trainer.sampler.steps_per_epoch:
                with clock.step():
                    step, batches = next(ahead)
                    trainer.train_step(step, batches)
                    trainer.costs.add(trainer.sampler.imbalance(step.parts))
                trainer.step_in_epoch, trainer.step = step.number + 1, trainer.step + 1
                if trainer.budget.learn(max(int(trainer.sampler.edges[share].sum()) for share in step.mine)):
                    break  # what was made ahead was cut for another budget
    return clock.records


def _checkpoint(trainer: Trainer, ranks: Ranks, scratch: Path) -> Record:
    """Seconds for which a checkpoint holds up the slowest rank, those until it is on the disk, and its bytes."""
    monitor = Monitor(None, quiet=True)
    ranks.barrier()
    began = time.perf_counter()
    trainer.save(monitor, best=False)
    held = time.perf_counter() - began
    # All ranks raise what one has found: the others would wait for it.
    if fault := ranks.broadcast(trainer.writer.finish() if ranks.rank == 0 else None):
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
        "edges_per_cpu_second": sum(edges) / sum(r["cpu_seconds"] for step in plain for r in step),
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


def _options_of(config: RunConfig) -> Record:
    """What was measured, without where files lie: that is the machine's own affair."""
    options = config.model_dump(mode="json", exclude={"run_dir": True, "data": {"path"}, "training": {"batch_size"}})
    for part, name in (("data", "stage"), ("engine", "deepspeed")):
        if options[part][name] is not None:
            options[part][name] = Path(options[part][name]).name
    return options


def _command() -> str:
    """What was typed, with the names of files alone: where they lie is the machine's own affair."""
    words = (word.rpartition("=") for word in [Path(sys.argv[0]).name, *sys.argv[1:]])
    return " ".join(f"{key}{equals}{Path(value).name if '/' in value else value}" for key, equals, value in words)


def _processor() -> str:
    """Its name, as Linux has it."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = (line.split(":", 1)[1].strip() for line in about.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())

"""All checks in their order, on every rank; a check that cannot run because an earlier one failed says so."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from dpt_hpc.doctor import files, machine, network
from dpt_hpc.doctor.finding import Finding, check, ok
from dpt_hpc.doctor.parity import parity
from dpt_hpc.doctor.throwaway import throwaway_trainer
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.deepspeed_options import stale_build_locks
from dpt_hpc.train.engine import choose_device
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.ranks import Ranks

LIMIT = 300.0
"""Seconds for one check."""
STRUCTURES_OF_A_RANK = 2
STRUCTURES_AT_MOST = 64
"""Of the step that is tried: rank 0 computes it alone too."""
COPIES = 2
"""Checkpoints beside the kept ones: the best one, and the one that is being written."""
BYTES_PER_WEIGHT = 4 * 4
"""Of a checkpoint: weight, two moments, and an average or the raw weight, in float32."""


def examine(config: PretrainConfig | FinetuneConfig, ranks: Ranks, limit: float = LIMIT) -> Iterator[Finding]:
    """One finding after the other, the same on every rank. Collective; leaves nothing behind.

    limit: seconds for each check, after which the process ends.
    """
    run_dir = Path(config.run_dir)
    scratch = files.nearest_that_exists(run_dir) / f".dpt_hpc_doctor_{ranks.broadcast(uuid.uuid4().hex[:8])}"
    try:
        yield from _findings(config, ranks, run_dir, scratch, limit)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def checkpoint_bytes(config: PretrainConfig | FinetuneConfig, weights: int) -> int:
    """What the checkpoints of a run with so many weights take at the most."""
    return (config.checkpoint.keep + COPIES) * max(BYTES_PER_WEIGHT * weights, files.BLOCK // 64)


def _findings(
    config: PretrainConfig | FinetuneConfig, ranks: Ranks, run_dir: Path, scratch: Path, limit: float
) -> Iterator[Finding]:
    def each(name: str, work: Callable[[], Finding]) -> Finding:
        return check(name, ranks, work, limit)

    yield each("versions", lambda: machine.versions(ranks))
    yield each("build", lambda: machine.build(ranks))
    yield each("start-up", lambda: machine.start_up(ranks))
    yield each("memory", lambda: machine.memory(ranks))
    yield each("build locks", _build_locks)
    data = each("dataset", lambda: files.dataset(config, ranks))
    yield data
    yield each("staging", lambda: files.staging(config, ranks))
    held: list[Trainer] = []
    if data.status == "bad":
        started = Finding("engine", "bad", "not tried: there are no data", "Mend the dataset first.")
    else:
        started = each("engine", lambda: _start(config, ranks, scratch, held))
    yield started
    yield each("placement", lambda: machine.placement(config, ranks))
    yield each("all-reduce", lambda: network.all_reduce(ranks, choose_device(config.engine, ranks.world)))
    yield each("one-sided get", lambda: network.one_sided_get(config, ranks))
    weights = sum(p.numel() for p in held[0].objective.parameters()) if held else 0
    need = checkpoint_bytes(config, weights)
    directory = each("run directory", lambda: files.run_directory(run_dir, scratch, need, ranks))
    yield directory
    if started.status == "bad":
        return
    trainer = held[0]
    yield each("parity", lambda: parity(trainer, config))
    if directory.status != "bad":
        yield each("checkpoint", lambda: files.checkpoint(trainer, ranks))
    trainer.data.store.close()


def _build_locks() -> Finding:
    locks = stale_build_locks()
    if not locks:
        return ok("build locks", "no lock of a killed build")
    said, _, todo = locks[0].partition("\n")
    return Finding("build locks", "bad", said, todo, {"locks": len(locks)})


def _start(config: PretrainConfig | FinetuneConfig, ranks: Ranks, scratch: Path, held: list[Trainer]) -> Finding:
    """A trainer on a handful of the config's structures, into `held`. Collective."""
    size = min(max(STRUCTURES_OF_A_RANK * ranks.size, 4), STRUCTURES_AT_MOST)
    # Every shard is hashed when the run begins.
    trainer, _, _ = throwaway_trainer(config, ranks, scratch, structures=size, batch_size=size)
    held.append(trainer)
    weights = sum(p.numel() for p in trainer.objective.parameters())
    return ok(
        "engine",
        f"{type(trainer.engine).__name__} on {trainer.engine.device.type}, {weights:,} weights, data from "
        f"{trainer.data.store.kind}",
        weights=weights,
        store=trainer.data.store.kind,
    )

"""The file system: the dataset is whole and read fast enough, the run directory takes checkpoints."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import torch

from dpt_hpc.data.group import agree
from dpt_hpc.data.manifest import Manifest, verify_shard
from dpt_hpc.data.staging import stage_room
from dpt_hpc.doctor.finding import Finding, ok
from dpt_hpc.errors import DataError, EnvironmentFault
from dpt_hpc.train.checkpoint import load_weights
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.monitor import Monitor
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.writer import restore

READ_AT_MOST = 256 << 20
"""Bytes that each rank reads to measure."""
BLOCK = 4 << 20
FIRST_WRITE = 64 << 20
"""Bytes at most that are written to try the run directory."""


def dataset(config: RunConfig, ranks: Ranks) -> Finding:
    """Every shard is there with the size it should have, and how fast all ranks together read."""
    shards = agree(ranks, lambda: _shards(config, ranks.rank == 0))
    total = sum(size for _, size in shards)
    paths = [path for path, _ in shards]
    first = ranks.rank % len(paths)
    everyone = ranks.all_gather(agree(ranks, lambda: _read(paths[first:] + paths[:first])))
    rate = sum(read for read, _ in everyone) / max(seconds for _, seconds in everyone)
    said = (
        f"{len(shards)} shard(s), {_told(total)}, all there; {ranks.size} rank(s) together read "
        f"{rate / 1e9:.2f} GB/s (from memory, if the system keeps it there)"
    )
    return ok("dataset", said, bytes=total, shards=len(shards), bytes_per_second=rate)


def staging(config: RunConfig, ranks: Ranks) -> Finding:
    """Every node can take a copy of the dataset where data.stage says."""
    if config.data.stage is None:
        return ok("staging", "data.stage is null: shards are read where they are")
    if ranks.node.rank:
        return ok("staging", "")
    need = sum(size for _, size in _shards(config, False))
    place, free = stage_room(config.data.stage)
    said = f"{place}: {_told(free)} free, {_told(need)} needed for the dataset"
    figures = {"need": need, "free": free}
    if free < need:
        todo = "Name a larger disk (what is staged there already needs no room), or set data.stage=null."
        return Finding("staging", "warn", f"{said}: too little space", todo, figures)
    return ok("staging", said, **figures)


def _shards(config: RunConfig, look: bool) -> list[tuple[Path, int]]:
    """Every shard and its bytes. look: whether they are there (thousands of ranks asking would be a storm)."""
    found = []
    for root in map(Path, config.data.path):
        for shard in Manifest.read(root).shards:
            if look:
                verify_shard(root / shard.file, shard, by_hash=False)
            found.append((root / shard.file, shard.num_bytes))
    return found


def _read(paths: list[Path]) -> tuple[int, float]:
    read, began = 0, time.perf_counter()
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while read < READ_AT_MOST and (block := file.read(BLOCK)):
                    read += len(block)
        except OSError as error:
            raise DataError(f"shard {path}: cannot be read: {error.strerror}.\nCheck its permissions.") from None
        if read >= READ_AT_MOST:
            break
    return read, time.perf_counter() - began


def nearest_that_exists(path: Path) -> Path:
    """`path`, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def run_directory(run_dir: Path, scratch: Path, need: int, ranks: Ranks) -> Finding:
    """Rank 0 can write there, fast enough, and there is room. scratch: beside the run. need: bytes of checkpoints."""
    if ranks.rank:
        return ok("run directory", "")
    size = min(need, FIRST_WRITE)
    rate = math.nan
    try:
        scratch.mkdir(parents=True)
        room, files = shutil.disk_usage(scratch), os.statvfs(scratch)
        if room.free >= need:
            began = time.perf_counter()
            with (scratch / "write").open("wb", buffering=0) as file:
                for _ in range(0, size, BLOCK):
                    file.write(bytes(min(BLOCK, size)))
                os.fsync(file.fileno())
            rate = size / (time.perf_counter() - began)
            (scratch / "write").unlink()
    except OSError as error:
        raise EnvironmentFault(
            f"{run_dir}: cannot be written: {error.strerror} ({error.filename or scratch}).\n"
            "Make room or get write access there, or choose another place with --set run_dir=DIR."
        ) from None
    figures = {"need": need, "free": room.free, "bytes_per_second": rate, "free_files": files.f_favail}
    said = f"{run_dir}: {_told(room.free)} free, {_told(need)} needed for checkpoints"
    if room.free < need:
        todo = "Make room, lower checkpoint.keep, or choose another place with --set run_dir=DIR."
        return Finding("run directory", "bad", f"{said}: too little space", todo, figures)
    said += f"; written with {rate / 1e6:.0f} MB/s"
    if (run_dir / "config.yaml").exists():
        todo = "Continue it with --resume, or choose another directory with --set run_dir=DIR."
        return Finding("run directory", "warn", f"{said}; it holds a run already", todo, figures)
    if files.f_files and files.f_favail < 1000:
        return Finding("run directory", "warn", f"{said}; {files.f_favail} files may be made", "Ask for more.", figures)
    return ok("run directory", said, **figures)


def checkpoint(trainer: Trainer, ranks: Ranks) -> Finding:
    """One is written by all ranks and read back: weights and optimiser are bit-equal. Collective."""
    weights = {name: value.detach().cpu().clone() for name, value in trainer.weights().items()}
    moments = trainer.engine.optimizer_state()
    began = time.perf_counter()
    trainer.save(Monitor(None, quiet=True), best=False)
    held = time.perf_counter() - began
    if ranks.rank:
        return ok("checkpoint", "")
    if fault := trainer.writer.finish():
        raise fault
    written = time.perf_counter() - began
    restored = restore(trainer.writer.directory)
    size = sum(path.stat().st_size for path in trainer.writer.directory.rglob("*") if path.is_file())
    figures = {"bytes": size, "seconds": written, "held_seconds": held}
    if restored is None or restored.state["step"] != trainer.step:
        wrong = ["its step"]
    else:
        found, state = load_weights(restored.checkpoint), restored.optimizer
        wrong = [name for name, value in weights.items() if not torch.equal(found[name], value)]
        wrong += [name for name, value in moments.items() if not torch.equal(state[name], value.cpu())]
    if wrong:
        said = f"what was read back is not what was written: {', '.join(wrong[:3])}"
        todo = "Do not trust this file system with a run; tell its administrators."
        return Finding("checkpoint", "bad", said, todo, figures)
    said = f"{_told(size)} written in {written:.2f} s (training waits {held:.2f} s), read back bit-equal"
    return ok("checkpoint", said, **figures)


def _told(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"

"""Node-local copies of shards: copied once per node, checked, and kept for the next job that finds them there."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dpt_hpc.data.group import Group, agree
from dpt_hpc.data.manifest import Manifest, Shard, sha256_of, verify_shard
from dpt_hpc.errors import ConfigError, EnvironmentFault

BLOCK = 1 << 24
ABANDONED_SECONDS = 86_400.0
"""A copy that nobody has written to for so long is not being made any more."""


def stage_shards(directories: Sequence[Path], manifests: Sequence[Manifest], stage: str, node: Group) -> list[Path]:
    """Copy the shards to `stage` on this node, the ranks of `node` sharing the work; returns where they are now.

    A copy that is there already, with the right hash, is used as it is. Raises DataError for a shard that is missing,
    truncated or altered; ConfigError if `stage` names a variable that is not set; EnvironmentFault if there is no room.
    """
    target = Path(_expanded(stage)).absolute()
    copies = [target / f"dataset-{manifest.digest[:16]}" for manifest in manifests]
    work = [
        (directory / shard.file, copy / shard.file, shard)
        for directory, copy, manifest in zip(directories, copies, manifests, strict=True)
        for shard in manifest.shards
    ]
    agree(node, lambda: _prepare(copies, work) if node.rank == 0 else None)

    def copy_mine() -> None:
        for source, copy, shard in work[node.rank :: node.size]:
            _copy(source, copy, shard)

    agree(node, copy_mine)
    return copies


def stage_room(stage: str) -> tuple[Path, int]:
    """Where `stage` leads to on this node, and the bytes that are free there. Makes nothing.

    Raises ConfigError if it names a variable that is not set; EnvironmentFault if nothing can be written there.
    """
    target = Path(_expanded(stage)).absolute()
    there = next(place for place in (target, *target.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise _fault(target, PermissionError(f"{there} is not a directory that can be written to"))
    return target, shutil.disk_usage(there).free


def _expanded(stage: str) -> str:
    path = os.path.expanduser(os.path.expandvars(stage))
    if unset := re.search(r"\$\{?(\w+)\}?", path):
        raise ConfigError(
            f"data.stage is {stage!r}, but the variable {unset[1]} is not set on {os.uname().nodename}.\n"
            "Name a directory on the node's own disk, or data.stage=null to read the shards where they are."
        )
    return path


def _prepare(copies: Sequence[Path], work: Sequence[tuple[Path, Path, Shard]]) -> None:
    """Make the directories; see that all that is to come has room. What killed jobs have left half copied goes."""
    try:
        for left in (path for directory in copies for path in directory.glob(".*.h5.*")):
            with suppress(FileNotFoundError):  # renamed or removed meanwhile, by another job
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()
        missing = sum(shard.num_bytes for _, copy, shard in work if not _there(copy, shard))
        for directory in copies:
            directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(copies[0]).free
    except OSError as error:
        raise _fault(copies[0], error) from None
    if missing > free:
        raise EnvironmentFault(
            f"data.stage {copies[0].parent}: {free / 1e9:.3g} GB are free on {os.uname().nodename}, but the shards "
            f"take {missing / 1e9:.3g} GB.\nName a larger disk, or data.stage=null to read the shards where they are."
        )


def _there(copy: Path, shard: Shard) -> bool:
    return copy.is_file() and copy.stat().st_size == shard.num_bytes


def _copy(source: Path, copy: Path, shard: Shard) -> None:
    """One shard, whole and right or not at all; another job may do the same at the same time."""
    try:
        if _there(copy, shard) and sha256_of(copy) == shard.sha256:
            return
    except OSError as error:
        raise _fault(copy, error) from None
    verify_shard(source, shard, by_hash=False)
    temporary = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}")
    try:
        with source.open("rb") as original, temporary.open("xb") as stream:
            shutil.copyfileobj(original, stream, BLOCK)
        if sha256_of(temporary) != shard.sha256:
            verify_shard(source, shard, by_hash=True)  # its message, if the original is to blame
            raise EnvironmentFault(
                f"data.stage {copy}: the copy of {source} has another SHA-256 than the original.\n"
                f"The disk of {os.uname().nodename} is not to be trusted: name another one, or data.stage=null."
            )
        temporary.replace(copy)
    except OSError as error:
        verify_shard(source, shard, by_hash=True)  # its message, if it is the original that cannot be read
        raise _fault(copy, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _fault(place: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(
        f"data.stage {place}: cannot be written on {os.uname().nodename}: {error}.\n"
        "Name a directory on the node's own disk, or data.stage=null to read the shards where they are."
    )

"""The official folds of Matbench (Dunn et al. 2020): what a fold tests, and what is left to learn from."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dpt_hpc.data.tables import Indices
from dpt_hpc.errors import DataError
from dpt_hpc.plain_text import from_json

FOLDS = 5
PARTS = ("train", "test")
ROW = re.compile(r"mb-.*-(\d+)")
"""Matbench's ids: mb-jdft2d-001 is the first row of matbench_jdft2d."""

PLACE = re.compile(r"(?:.*:)?(\d+)")
"""Other ids that say which row a structure is, counted from 0: 12, or jdft:12 of a file without ids."""


def matbench_fold(path: str, task: str | None, num_structures: int, fold: int) -> tuple[Indices, Indices]:
    """The structures to learn from and to test of `fold`, 0 to 4: sorted places in the dataset, in Matbench's order.

    path: Matbench's validation file (matbench_v0.1_validation.json, or with some tasks only; .gz too). task: such as
    matbench_jdft2d; None: the file's only one with so many structures. Raises DataError where the dataset cannot be
    that task's, or for a fold that Matbench has not.
    """
    tasks = _read(path)
    task = _task_of(tasks, path, task, num_structures)
    if not 0 <= fold < FOLDS:
        raise DataError(
            f"data.split.matbench: the seed is {fold}, and is the number of the fold, but there are folds 0 to "
            f"{FOLDS - 1}.\nSet seeds to some of these."
        )
    parts = tasks[task][f"fold_{fold}"]
    learnt, tested = (np.sort(np.array([_row(name, path) for name in parts[part]])) for part in PARTS)
    if not np.array_equal(np.sort(np.concatenate([learnt, tested])), np.arange(num_structures)):
        raise DataError(
            f"{path}: fold {fold} of {task} does not hold each of its {num_structures:,} rows once.\n"
            "Download the file again: its SHA-256 is published with Matbench."
        )
    return learnt, tested


def describe_folds(path: str, task: str | None, num_structures: int, fold: int) -> dict[str, Any]:
    """Which fold of which file a run tests, for run.json and the model card: a file may change, its digest tells.

    Raises DataError as `matbench_fold` does.
    """
    found = _task_of(_read(path), path, task, num_structures)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return {"path": path, "task": found, "fold": fold, "digest": digest}


def check_order(ids: Sequence[str]) -> None:
    """Refuse a dataset whose ids do not count Matbench's rows, or do not say which rows its structures are.

    Raises DataError that names the first such structure.
    """
    for place, name in enumerate(ids):
        row = int(m[1]) - 1 if (m := ROW.fullmatch(name)) else int(m[1]) if (m := PLACE.fullmatch(name)) else None
        if row is None:
            raise DataError(
                f"data.split.matbench: structure {place} of the dataset is {name!r}, which does not say which row of "
                "Matbench it is.\nThe folds count the rows: ingest Matbench's own file without --id-key, or give the "
                "structures ids that count its rows from 0."
            )
        if row != place:
            raise DataError(
                f"data.split.matbench: structure {place} of the dataset is {name}: not in Matbench's order.\n"
                "The folds count its rows: ingest all of them, in that order."
            )


def _task_of(tasks: Mapping[str, Any], path: str, task: str | None, num_structures: int) -> str:
    """`task`, or the only one with so many structures; DataError if it cannot be that of such a dataset."""
    sizes = {name: sum(len(folds["fold_0"][part]) for part in PARTS) for name, folds in tasks.items()}
    if task is None:
        fitting = [name for name, size in sizes.items() if size == num_structures]
        if len(fitting) != 1:
            raise DataError(
                f"data.split.matbench: the dataset has {num_structures:,} structures, as {len(fitting)} of the tasks "
                f"of {path} have: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}.\n"
                "The folds are of whole datasets: ingest all of one, in Matbench's order, or set matbench_task."
            )
        return fitting[0]
    if task not in tasks:
        raise DataError(
            f"data.split.matbench_task is {task!r}, but {path} has {', '.join(tasks)}.\nSet it to one of them, or null."
        )
    if sizes[task] != num_structures:
        raise DataError(
            f"data.split.matbench: {task} has {sizes[task]:,} structures, the dataset {num_structures:,}.\n"
            "The folds count its rows: ingest all of them, in Matbench's order."
        )
    return task


@lru_cache(maxsize=2)
def _read(path: str) -> Mapping[str, Any]:
    try:
        content = Path(path).read_bytes()
        found = from_json(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        tasks = found.get("splits", found)  # the official file has more than the splits
        parts = [folds[f"fold_{k}"][part] for folds in tasks.values() for k in range(FOLDS) for part in PARTS]
        if not all(isinstance(names, list) and names and all(isinstance(n, str) for n in names) for names in parts):
            raise ValueError
    except OSError as error:
        raise DataError(f"data.split.matbench: {path}: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error):
        raise DataError(
            f"data.split.matbench: {path}: not a validation file of Matbench: expected tasks with folds fold_0 to "
            "fold_4, each with train and test.\nGive matbench_v0.1_validation.json."
        ) from None
    return dict(tasks)


def _row(name: str, path: str) -> int:
    match = ROW.fullmatch(name)
    if match is None:
        raise DataError(f"{path}: {name!r} is not an id of Matbench, such as mb-jdft2d-001.\nDownload the file again.")
    return int(match[1]) - 1

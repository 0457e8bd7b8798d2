"""The official folds of Matbench (Dunn et al. 2020): what a fold tests, and what is left to learn from."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dpt_hpc.data.tables import Indices
from dpt_hpc.errors import DataError

FOLDS = 5
ROW = re.compile(r"mb-.*-(\d+)")
"""Matbench's ids: mb-jdft2d-001 is the first row of matbench_jdft2d."""


def matbench_fold(path: str, task: str | None, num_structures: int, fold: int) -> tuple[Indices, Indices]:
    """The structures to learn from and to test of `fold`, 0 to 4: sorted places in the dataset, in Matbench's order.

    path: Matbench's validation file (matbench_v0.1_validation.json, or with some tasks only; .gz too). task: such as
    matbench_jdft2d; None: the file's only one with so many structures. Raises DataError where the dataset cannot be
    that task's.
    """
    tasks = _read(path)
    sizes = {name: sum(len(part) for part in folds["fold_0"].values()) for name, folds in tasks.items()}
    if task is None:
        fitting = [name for name, size in sizes.items() if size == num_structures]
        if len(fitting) != 1:
            raise DataError(
                f"data.split.matbench: the dataset has {num_structures:,} structures, as {len(fitting)} of the tasks "
                f"of {path} have: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}.\n"
                "The folds are of whole datasets: ingest all of one, in Matbench's order, or set matbench_task."
            )
        task = fitting[0]
    if task not in tasks:
        raise DataError(
            f"data.split.matbench_task is {task!r}, but {path} has {', '.join(tasks)}.\nSet it to one of them, or null."
        )
    if sizes[task] != num_structures:
        raise DataError(
            f"data.split.matbench: {task} has {sizes[task]:,} structures, the dataset {num_structures:,}.\n"
            "The folds count its rows: ingest all of them, in Matbench's order."
        )
    parts = tasks[task][f"fold_{fold}"]
    learnt, tested = (np.sort(np.array([_row(name, path) for name in parts[part]])) for part in ("train", "test"))
    if not np.array_equal(np.sort(np.concatenate([learnt, tested])), np.arange(num_structures)):
        raise DataError(
            f"{path}: fold {fold} of {task} does not hold each of its {num_structures:,} rows once.\n"
            "Download the file again: its SHA-256 is published with Matbench."
        )
    return learnt, tested


def check_order(ids: Sequence[str]) -> None:
    """Refuse a dataset whose ids are numbers, or Matbench's own, that do not count its rows. Raises DataError."""
    numbers = [int(name) if name.isdigit() else int(m[1]) - 1 if (m := ROW.fullmatch(name)) else -1 for name in ids]
    wrong = next((i for i, number in enumerate(numbers) if number != i), None)
    if -1 not in numbers and wrong is not None:
        raise DataError(
            f"data.split.matbench: structure {wrong} of the dataset is {ids[wrong]}: not in Matbench's order.\n"
            "The folds count its rows: ingest all of them, in that order."
        )


@lru_cache(maxsize=2)
def _read(path: str) -> Mapping[str, Any]:
    try:
        content = Path(path).read_bytes()
        found = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        tasks = found.get("splits", found)  # the official file has more than the splits
        assert all(len(folds["fold_0"]["train"]) and folds["fold_0"]["test"] for folds in tasks.values())
    except OSError as error:
        raise DataError(f"data.split.matbench: {path}: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, EOFError):
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

"""The data of a run: opened together by all ranks, split once, and how its structures become batches on a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dpt_hpc.data.folds import describe_folds
from dpt_hpc.data.group import agree
from dpt_hpc.data.leaks import read_exclusion
from dpt_hpc.data.loader import Loader, Step, in_windows, parts_in_windows
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.data.store import Store
from dpt_hpc.data.store_choice import open_store
from dpt_hpc.data.tables import Indices
from dpt_hpc.errors import DataError
from dpt_hpc.structure import Batch
from dpt_hpc.train.config import DataOptions, ObjectiveOptions
from dpt_hpc.train.once_a_node import from_first
from dpt_hpc.train.parts import make_split
from dpt_hpc.train.ranks import Ranks

PIECE = 512
"""Structures that are fetched at a time where they are read in a given order, not in the windows of an epoch."""


@dataclass(frozen=True)
class Data:
    """Where the structures of a run come from, its split, and the device for its batches."""

    store: Store
    split: Split
    device: torch.device

    @property
    def dataset(self) -> Dataset:
        return self.store.dataset

    @contextmanager
    def naming(self, batch: Batch) -> Iterator[None]:
        """Whatever is wrong with a structure of `batch` is told with its id: nobody else knows the order of a batch."""
        try:
            yield
        except DataError as error:
            if error.structure is None:
                raise
            index = int(batch.structure_index[error.structure])
            raise DataError(f"{error}\nIn the dataset it is {self.dataset.ids([index])[0]}.") from None

    def batches(self, indices: Indices, size: int) -> Iterator[Batch]:
        """The structures `indices` in that order, `size` at a time, fetched ahead."""
        yield from self._loaded(in_windows(indices, size, PIECE))

    def parts(self, parts: Iterable[Indices]) -> Iterator[Batch]:
        """A batch of each of `parts`, in their order, fetched ahead."""
        yield from self._loaded(parts_in_windows(parts, PIECE))

    def _loaded(self, windows: Iterable[list[Step]]) -> Iterator[Batch]:
        with Loader(self.store, windows) as loader:
            for _, (batch,) in loader:
                yield batch.to(self.device)


def open_dataset(options: DataOptions, ranks: Ranks, *, verify: bool = True) -> Dataset:
    """The dataset that `options` name, its bytes verified once. Collective; an error is raised on every rank."""
    return Dataset.open(options.path, verify=verify, stage=options.stage, node=ranks.node, everyone=ranks)


def share_split(dataset: Dataset, options: DataOptions, objective: ObjectiveOptions, seed: int, ranks: Ranks) -> Split:
    """The split, made by rank 0, once in the memory of each node.

    Collective; raises on every rank as `make_split` and `read_exclusion` do.
    """

    def made() -> Split:
        excluded = None if options.exclude is None else read_exclusion(options.exclude, dataset)
        return make_split(dataset, options.split, objective, seed, options.path, excluded)

    split = agree(ranks, lambda: made() if ranks.rank == 0 else None)
    parts = ("train", "validation", "test", "excluded")
    return Split(*(from_first(None if split is None else getattr(split, part), ranks) for part in parts))


def share_folds(dataset: Dataset, options: DataOptions, seed: int, ranks: Ranks) -> dict[str, Any] | None:
    """`describe_folds` of a run on Matbench's folds, None of any other; rank 0 reads the file for all. Collective."""
    if (path := options.split.matbench) is None:
        return None

    def described() -> dict[str, Any]:
        return describe_folds(path, options.split.matbench_task, len(dataset), seed)

    folds: dict[str, Any] = ranks.broadcast(agree(ranks, lambda: described() if ranks.rank == 0 else None))
    return folds


def store_for(dataset: Dataset, options: DataOptions, dtype: torch.dtype, target: str | None, ranks: Ranks) -> Store:
    """The store that `options` ask for. Collective; raises as `open_store` does."""
    return open_store(
        dataset,
        dataset.layout(dtype, target),
        options.store,
        options.memory,
        everyone=ranks,
        node=ranks.node,
        node_rank=ranks.world.node_rank,
    )

"""Where the structures of a run are kept between its steps; every store gives the same batches, bit for bit.

disk: nowhere; each rank reads what it needs, a window ahead. node: one copy in the memory of each node (store_node.py).
cluster: one copy over all nodes (store_cluster.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import ClassVar

import numpy as np

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.tables import Indices, Layout, Tables
from dpt_hpc.structure import Batch


class Store(ABC):
    """The structures of `dataset`, as batches of `layout`."""

    kind: ClassVar[str]

    def __init__(self, dataset: Dataset, layout: Layout) -> None:
        self.dataset = dataset
        self.layout = layout

    @abstractmethod
    def fetch(self, indices: Indices) -> Tables:
        """Tables from which batches of the structures `indices` (B,) can be packed. May be called in any thread."""

    def read(self, indices: Sequence[int] | Indices) -> Batch:
        """The structures `indices` (B,), in that order, as one batch; at once."""
        wanted = np.asarray(indices, dtype=np.int64)
        return self.fetch(wanted).batch(wanted)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Give back memory and files. failed: something went wrong here, so no other rank may be waited for."""
        self.dataset.files.close()


class DiskStore(Store):
    """Keeps nothing: two windows of each rank, and up to 20 MB of chunks of four open shards, whatever the dataset.

    What a run knows of every structure is 32 bytes, once on each node: where its atoms begin and its edges estimated
    (`Dataset`), its place in the split, its edges counted.
    """

    kind = "disk"

    def fetch(self, indices: Indices) -> Tables:
        return self.dataset.fetch(indices, self.layout)

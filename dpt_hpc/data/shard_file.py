"""Shards as HDF5 files: flat arrays with row pointers. The only door of h5py.

A shard is readable with plain h5py. Atoms of all structures lie in one array; `atom_ptr` (S+1,) says where each
structure's begin:

    atom_ptr (S+1,) int64 · atomic_numbers (A,) uint8 · positions (A,3) Å · cell (S,3,3) Å, rows are lattice vectors ·
    pbc (S,3) bool · energy (S,) eV, total · forces (A,3) eV/Å · stress (S,3,3) eV/Å³, tension positive ·
    has_energy, has_forces, has_stress (S,) bool · properties/NAME (S,) with properties/has_NAME (S,) bool ·
    structure_id, group (S,) UTF-8 · edge_estimate (S,) int64

A label that no structure of the shard has is not written; where one structure lacks it, its rows are 0.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dpt_hpc.data.columns import LABELS, Array
from dpt_hpc.data.manifest import COPY_AGAIN
from dpt_hpc.errors import DataError

CHUNK_ROWS = 4096
OPEN_FILES = 4
"""Shards that a process holds open at once."""
CACHE_BYTES = 1 << 19
"""Chunks that HDF5 keeps of each column of an open shard: one of every column, however wide."""

COLUMNS: Mapping[str, tuple[Any, ...]] = {
    "atom_ptr": ("i", "S+1"),
    "atomic_numbers": ("u", "A"),
    "positions": ("f", "A", 3),
    "cell": ("f", "S", 3, 3),
    "pbc": ("b", "S", 3),
    "energy": ("f", "S"),
    "forces": ("f", "A", 3),
    "stress": ("f", "S", 3, 3),
    **{f"has_{label}": ("b", "S") for label in LABELS},
    "structure_id": ("S", "S"),
    "group": ("S", "S"),
    "edge_estimate": ("iu", "S"),
}
"""Each column's kinds, as numpy's letters, and its shape."""
UNREADABLE = (OSError, KeyError, RuntimeError, TypeError, ValueError)
"""What h5py raises for a damaged file."""


def write_shard_file(
    path: Path,
    columns: Mapping[str, Array],
    attributes: Mapping[str, Any],
    units: Mapping[str, str | None],
    compression: str | None,
) -> None:
    """Write the arrays `columns` (names as in the module docstring) with their `units`; `path` must not exist."""
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs["conventions"] = (__doc__ or "").strip()
        file.attrs.update(attributes)
        for name, values in columns.items():
            _write_column(file, name, values, compression)
            if (unit := units[name]) is not None:
                file[name].attrs["units"] = unit


def _write_column(file: h5py.File, name: str, values: Array, compression: str | None) -> None:
    layout: dict[str, Any] = {"chunks": (min(len(values), CHUNK_ROWS), *values.shape[1:])}
    if compression:
        layout |= {"compression": compression, "shuffle": True}
    if values.dtype.kind == "U":
        encoded = np.char.encode(values, "utf-8")
        kind = h5py.string_dtype("utf-8", max(1, encoded.dtype.itemsize))
        file.create_dataset(name, data=encoded.astype(kind), dtype=kind, **layout)
    else:
        file.create_dataset(name, data=values, **layout)


class ShardFiles:
    """The shards of a dataset, each opened when it is first read in this process, at most a few open at once.

    May be shared by threads. A forked child opens its own.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, tuple[h5py.File, dict[str, h5py.Dataset | None]]] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._inherited: list[object] = []

    def read(self, shard: int, name: str, start: int = 0, stop: int | None = None) -> Array | None:
        """Rows start to stop of a column, text as UTF-8 bytes; None if the shard has no such column.

        Raises DataError, naming the file, if it cannot be read.
        """
        with self._lock:
            try:
                column = self._column(shard, name)
                if column is None:
                    return None
                values: Array = column[start:stop]
            except UNREADABLE as error:
                raise DataError(f"shard {self.paths[shard]}: cannot be read: {error}.\n{COPY_AGAIN}") from None
        return values

    def check_columns(self, shard: int, structures: int, atoms: int) -> None:
        """Raises DataError, naming the column, if one is missing, not of the kind and shape that the docstring of this
        module states, or kept in another file."""
        rows = {"S": structures, "S+1": structures + 1, "A": atoms}
        with self._lock:
            try:
                file = self._opened(shard)[0]
                names = {*COLUMNS, *(f"properties/{name}" for name in file.get("properties", ()))}
                for name in sorted(names):
                    default = ("b", "S") if name.startswith("properties/has_") else ("f", "S")
                    kinds, length, *inner = COLUMNS.get(name, default)
                    fault = _fault(file, name, kinds, (rows[length], *inner))
                    if fault is not None:
                        raise DataError(f"shard {self.paths[shard]}: {fault}.\n{COPY_AGAIN}")
            except UNREADABLE as error:
                raise DataError(f"shard {self.paths[shard]}: cannot be read: {error}.\n{COPY_AGAIN}") from None

    def close(self) -> None:
        """Close what is open; a later read opens it again."""
        with self._lock:
            for file, _ in self._open.values():
                file.close()
            self._open.clear()

    def _column(self, shard: int, name: str) -> h5py.Dataset | None:
        file, columns = self._opened(shard)
        if name not in columns:
            columns[name] = file.get(name)  # to find it by name takes as long as to read a block of 64 structures
        return columns[name]

    def _opened(self, shard: int) -> tuple[h5py.File, dict[str, h5py.Dataset | None]]:
        if self._process != os.getpid():
            # Handles of the parent share its file positions: they are not to be used, nor, by being forgotten, closed.
            self._inherited.append(self._open)
            self._open, self._process = OrderedDict(), os.getpid()
        if shard not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1][0].close()
            self._open[shard] = h5py.File(self.paths[shard], "r", rdcc_nbytes=CACHE_BYTES), {}
        self._open.move_to_end(shard)
        return self._open[shard]


def _fault(file: h5py.File, name: str, kinds: str, shape: tuple[int, ...]) -> str | None:
    """Why a column is not what it should be: a kind among `kinds` (numpy's letters), and `shape`."""
    if name not in file:
        return None if name in LABELS else f"cannot be read: it has no {name}"
    column = file[name]
    if not isinstance(column, h5py.Dataset):
        return f"{name} is a group, expected a column"
    if column.file.id != file.id or column.external is not None or column.is_virtual:
        return f"{name} is kept in another file, which nobody has checked"
    if column.dtype.kind not in kinds or column.shape != shape:
        return f"{name} is {column.dtype} of shape {column.shape}, expected kind {'/'.join(kinds)} of shape {shape}"
    return None

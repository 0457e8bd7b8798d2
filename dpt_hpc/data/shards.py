"""Datasets on disk, read: one or several directories of shards as one sequence of structures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpt_hpc.data.columns import LABELS, Array
from dpt_hpc.data.group import ALONE, Group, agree
from dpt_hpc.data.joining import join_units, refuse_shared_ids, refuse_twins
from dpt_hpc.data.manifest import COPY_AGAIN, Manifest, verify_shard
from dpt_hpc.data.shard_file import ShardFiles
from dpt_hpc.data.shared_memory import shared_or_own
from dpt_hpc.data.staging import stage_shards
from dpt_hpc.data.tables import Indices, Layout, Tables
from dpt_hpc.errors import DataError
from dpt_hpc.structure import SYMBOLS, Batch, Structure

GAP_ATOMS = 512
"""Structures that lie closer than this in a shard are read together: 25 kB of float64 cost less than another call."""
SLICE_ATOMS = 1 << 18
"""At most so many atoms are read at a time (13 MB of float64), unless one structure has more."""

SLICE_STRUCTURES = 1 << 16


class Dataset:
    """One or several dataset directories, read as one sequence of structures.

    atom_ptr (S+1,) int64 · edge_estimate (S,) int64: kept in memory, 16 bytes a structure, once for the ranks of a node
    where /dev/shm has room, and nothing else. Read from disk when they are asked for, and not kept: groups,
    structure_ids (S,) str · has_energy, has_forces, has_stress (S,) bool. num_atoms (S,) int64 · elements: sorted
    atomic numbers · labels: of energy, forces, stress, those that some structure has · property_names,
    property_units · manifests, one per path.
    """

    def __init__(self, directories: Sequence[Path], manifests: Sequence[Manifest], node: Group = ALONE) -> None:
        self.manifests = tuple(manifests)
        self.property_units = join_units(directories, manifests)
        self.property_names = tuple(sorted(self.property_units))
        shards = [(d / shard.file, shard) for d, m in zip(directories, manifests, strict=True) for shard in m.shards]
        self.files = ShardFiles([path for path, _ in shards])
        self.first_structure = np.cumsum([0, *(s.num_structures for _, s in shards)])
        self.first_atom = np.cumsum([0, *(s.num_atoms for _, s in shards)])
        self.labels = tuple(name for name in LABELS if any(m.statistics["labels"].get(name) for m in manifests))
        symbols = {symbol for m in manifests for symbol in m.statistics["elements"]}
        self.elements = sorted(SYMBOLS.index(symbol) for symbol in symbols)
        held, shared = shared_or_own(8 * (2 * len(self) + 1), node, f"the index of {len(self)} structures")
        index = held.view(np.int64)
        self.atom_ptr, self.edge_estimate = index[: len(self) + 1], index[len(self) + 1 :]

        def read_heads() -> None:
            for shard in range(node.rank, len(shards), node.size) if shared else range(len(shards)):
                atom_ptr, estimate = self._head(shard)
                start, stop = self.first_structure[shard : shard + 2].tolist()
                self.atom_ptr[start : stop + 1] = atom_ptr + self.first_atom[shard]
                self.edge_estimate[start:stop] = estimate

        agree(node, read_heads)
        for kept in (self.atom_ptr, self.edge_estimate):
            kept.flags.writeable = False

    @classmethod
    def open(
        cls,
        paths: str | Path | Sequence[str | Path],
        *,
        verify: bool = True,
        stage: str | None = None,
        node: Group = ALONE,
        everyone: Group | None = None,
    ) -> Dataset:
        """Open one or several dataset directories. Collective among all ranks of `everyone` (None: of `node`), those of
        `node` being this node's; they divide the work.

        verify: compare every shard's SHA-256 with the manifest: all ranks together read every byte once, and each node
        looks whether it sees files of that size. stage: a directory of this node (`${TMPDIR}` and the like are
        expanded) to copy the shards to, and to read them from. Raises DataError if a directory, its manifest or a
        shard is missing, truncated, altered, empty or of another version, and if two directories hold the same data or
        the same structure_id: it would stand in training and test part; EnvironmentFault if they cannot be staged. On
        every rank, whichever found it.
        """
        ranks = node if everyone is None else everyone
        directories = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
        read = agree(ranks, lambda: _read_manifests(directories) if node.rank == 0 else [])
        manifests = node.all_gather(read)[0]
        if stage is not None:
            directories = agree(ranks, lambda: stage_shards(directories, manifests, stage, node))
        shards = [(d / shard.file, shard) for d, m in zip(directories, manifests, strict=True) for shard in m.shards]

        def check_mine() -> None:
            for path, shard in shards[node.rank :: node.size]:
                verify_shard(path, shard, by_hash=False)
            # What was staged has been hashed while it was copied.
            for path, shard in shards[ranks.rank :: ranks.size] if verify and stage is None else ():
                verify_shard(path, shard, by_hash=True)

        agree(ranks, check_mine)
        dataset = agree(ranks, lambda: cls(directories, manifests, node))
        if len(directories) > 1:
            sizes = [m.num_structures for m in manifests]
            ids = partial(dataset._parts, "structure_id")
            agree(ranks, lambda: refuse_shared_ids(directories, sizes, ids) if ranks.rank == 0 else None)
        return dataset

    def __len__(self) -> int:
        return int(self.first_structure[-1])

    @property
    def num_atoms(self) -> NDArray[np.int64]:
        """(S,)"""
        return np.diff(self.atom_ptr)

    def num_atoms_of(self, indices: Indices) -> NDArray[np.int64]:
        """(B,) of a few."""
        return self.atom_ptr[indices + 1] - self.atom_ptr[indices]

    def atoms_in(self, indices: Indices) -> int:
        """Of all of `indices` (B,) together, summed piece by piece: every rank may ask."""
        pieces = (indices[at : at + SLICE_STRUCTURES] for at in range(0, len(indices), SLICE_STRUCTURES))
        return sum(int(self.num_atoms_of(piece).sum()) for piece in pieces)

    @property
    def structure_ids(self) -> NDArray[np.str_]:
        """(S,) all of them; `ids` reads a few."""
        return np.concatenate([np.char.decode(part, "utf-8") for part in self._parts("structure_id")])

    @property
    def groups(self) -> NDArray[np.str_]:
        """(S,) names; `group_codes` are smaller."""
        return np.concatenate([np.char.decode(part, "utf-8") for part in self._parts("group")])

    @property
    def group_codes(self) -> NDArray[np.int64]:
        """(S,) the rank of each structure's group among the sorted names of all groups."""
        names = np.unique(np.concatenate([np.unique(part) for part in self._parts("group")]))
        return np.concatenate([np.searchsorted(names, part) for part in self._parts("group")])

    @property
    def has_energy(self) -> NDArray[np.bool_]:
        """(S,)"""
        return self._column("has_energy", np.dtype(bool))

    @property
    def has_forces(self) -> NDArray[np.bool_]:
        """(S,)"""
        return self._column("has_forces", np.dtype(bool))

    @property
    def has_stress(self) -> NDArray[np.bool_]:
        """(S,)"""
        return self._column("has_stress", np.dtype(bool))

    def property_values(self, name: str) -> NDArray[np.float64]:
        """(S,) values of a property in its unit; NaN where a structure lacks it."""
        values = self._column(f"properties/{name}", np.dtype(np.float64))
        values[~self._column(f"properties/has_{name}", np.dtype(bool))] = np.nan
        return values

    def elements_of(self, indices: Indices, share: Group = ALONE) -> set[int]:
        """The atomic numbers in those of the structures `indices` (B,), ascending, that lie in this rank's share of the
        shards: a byte an atom is read, and nothing else."""
        found: set[int] = set()
        for shard in range(share.rank, len(self.files.paths), share.size):
            first, end = self.first_structure[shard : shard + 2].tolist()
            wanted = np.zeros(end - first, dtype=bool)
            wanted[indices[slice(*np.searchsorted(indices, [first, end]))] - first] = True
            numbers = self.files.read(shard, "atomic_numbers")
            if numbers is not None and wanted.any():
                found |= set(np.unique(numbers[np.repeat(wanted, np.diff(self.atom_ptr[first : end + 1]))]).tolist())
        return found

    def ids(self, indices: Sequence[int] | Indices) -> list[str]:
        """The ids of the structures `indices` (B,), in that order."""
        return self.id_array(indices).tolist()

    def volumes(self, indices: Indices) -> NDArray[np.float64]:
        """(B,) Å³ of the cells of the structures `indices` (B,), which ascend."""
        found = [np.empty(0)]
        for start, stop in self._runs(indices):
            shard, low = self._place(int(indices[start]))
            cells = self.files.read(shard, "cell", low, low + int(indices[stop - 1] - indices[start]) + 1)
            found.append(np.abs(np.linalg.det(np.array(cells)[indices[start:stop] - indices[start]])))
        return np.concatenate(found)

    def id_array(self, indices: Sequence[int] | Indices) -> NDArray[np.str_]:
        """(B,) the same, for many."""
        index, places = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        found = [np.empty(0, dtype="S1")]
        for start, stop in self._runs(index):
            shard, low = self._place(int(index[start]))
            values = self.files.read(shard, "structure_id", low, low + int(index[stop - 1] - index[start]) + 1)
            found.append(np.array(values)[index[start:stop] - index[start]])
        return np.char.decode(np.concatenate(found), "utf-8")[places]

    def layout(self, dtype: torch.dtype, target: str | None) -> Layout:
        """What batches in `dtype` need. Raises DataError if the dataset has no property `target`."""
        if target is not None and target not in self.property_units:
            raise DataError(
                f"target is {target!r}, but the dataset has {', '.join(self.property_names) or 'no properties'}.\n"
                "Name one of them."
            )
        return Layout(dtype, self.labels, target)

    def read(
        self, indices: Sequence[int] | Indices, *, dtype: torch.dtype = torch.float32, target: str | None = None
    ) -> Batch:
        """The structures `indices` (B,), in that order, as one batch in `dtype`; `target` names a property."""
        index = np.asarray(indices, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"Dataset.read: indices {index.min()} to {index.max()}, expected 0 to {len(self) - 1}")
        return self.fetch(index, self.layout(dtype, target)).batch(index)

    def fetch(self, indices: Indices, layout: Layout) -> Tables:
        """Read the structures `indices` (B,), each at most once and in the order in which they lie on disk."""
        index = np.unique(indices)
        count = self.atom_ptr[index + 1] - self.atom_ptr[index]
        tables = Tables.empty(layout, index, np.concatenate([[0], np.cumsum(count)]).astype(np.int64))
        for start, stop in self._runs(index):
            self._fill(tables, start, stop)
        return tables

    def fill(self, tables: Tables, start: int, stop: int) -> None:
        """Read the structures at places start to stop of `tables`."""
        index = np.asarray(tables.index[start:stop], dtype=np.int64)
        for first, last in self._runs(index):
            self._fill(tables, start + first, start + last)

    def _runs(self, index: Indices) -> Iterator[tuple[int, int]]:
        """Stretches of `index` (ascending) that are worth one read: in one shard, close together, of bounded size."""
        if not len(index):
            return
        shard = np.searchsorted(self.first_structure, index, side="right")
        gap = self.atom_ptr[index[1:]] - self.atom_ptr[index[:-1] + 1]
        borders = np.flatnonzero((shard[1:] != shard[:-1]) | (gap > GAP_ATOMS)) + 1
        for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(index)], strict=True):
            while start < stop:
                limit = self.atom_ptr[index[start]] + SLICE_ATOMS
                end = start + int(np.searchsorted(self.atom_ptr[index[start:stop] + 1], limit, side="right"))
                end = max(end, start + 1)
                yield start, end
                start = end

    def _fill(self, tables: Tables, start: int, stop: int) -> None:
        """Read one stretch, and take from it what is wanted."""
        index = np.asarray(tables.index[start:stop], dtype=np.int64)
        low, high = int(index[0]), int(index[-1]) + 1
        shard = int(np.searchsorted(self.first_structure, low, side="right")) - 1
        rows: Array | slice = slice(None)
        atoms: Array | slice = slice(None)
        if len(index) < high - low:
            rows = index - low
            count = self.atom_ptr[index + 1] - self.atom_ptr[index]
            places = np.cumsum(count) - count
            atoms = np.arange(count.sum()) + np.repeat(self.atom_ptr[index] - self.atom_ptr[low] - places, count)
        first = int(self.first_structure[shard])
        for name in tables.structures.dtype.names or ():
            values = self.files.read(shard, name, low - first, high - first)
            if values is not None:
                tables.structures[name][start:stop] = values[rows]
        first = int(self.first_atom[shard])
        begin, end = int(self.atom_ptr[low]) - first, int(self.atom_ptr[high]) - first
        into = slice(int(tables.atom_ptr[start]), int(tables.atom_ptr[stop]))
        for name in tables.atoms.dtype.names or ():
            values = self.files.read(shard, name, begin, end)
            if values is not None:
                tables.atoms[name][into] = values[atoms]

    def get(self, index: int) -> Structure:
        """One structure with all its labels, in float64."""
        index = int(index)
        shard, row = self._place(index)
        first = int(self.first_atom[shard])
        atoms = (int(self.atom_ptr[index]) - first, int(self.atom_ptr[index + 1]) - first)

        def one(name: str, start: int = row, stop: int = row + 1) -> Array | None:
            return self.files.read(shard, name, start, stop)

        def has(name: str) -> bool:
            present = one(f"has_{name}" if name in LABELS else f"properties/has_{name}")
            return present is not None and bool(present[0])

        def tensor(name: str, start: int = row, stop: int = row + 1) -> torch.Tensor:
            return torch.from_numpy(np.array(one(name, start, stop), dtype=np.float64))

        return Structure(
            positions=tensor("positions", *atoms),
            cell=tensor("cell")[0],
            pbc=torch.from_numpy(np.array(one("pbc"))[0]),
            atomic_numbers=torch.from_numpy(np.array(one("atomic_numbers", *atoms), dtype=np.int64)),
            energy=float(tensor("energy")) if has("energy") else None,
            forces=tensor("forces", *atoms) if has("forces") else None,
            stress=tensor("stress")[0] if has("stress") else None,
            properties={name: float(tensor(f"properties/{name}")) for name in self.property_names if has(name)},
            structure_id=self.ids([index])[0],
            group=np.array(one("group"))[0].decode(),
        )

    def _place(self, index: int) -> tuple[int, int]:
        """Shard of a structure, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"structure {index}, expected 0 to {len(self) - 1}")
        shard = int(np.searchsorted(self.first_structure, index, side="right")) - 1
        return shard, index - int(self.first_structure[shard])

    def _parts(self, name: str) -> Iterator[Array]:
        """A column of structures, shard by shard. Raises DataError if one lacks it."""
        for shard, path in enumerate(self.files.paths):
            values = self.files.read(shard, name)
            if values is None:
                raise DataError(f"shard {path}: cannot be read: it has no {name}.\n{COPY_AGAIN}")
            yield values

    def _column(self, name: str, dtype: np.dtype[Any]) -> Array:
        """(S,) a column of structures; zeros (False) for a shard that has not got it."""
        column = np.zeros(len(self), dtype=dtype)
        for shard, (start, stop) in enumerate(itertools.pairwise(self.first_structure.tolist())):
            values = self.files.read(shard, name)
            if values is not None:
                column[start:stop] = values
        return column

    def _head(self, shard: int) -> tuple[Array, Array]:
        """What is kept in memory of a shard. Raises DataError if it does not hold what the manifest says."""
        structures = int(np.diff(self.first_structure)[shard])
        atoms = int(np.diff(self.first_atom)[shard])
        self.files.check_columns(shard, structures, atoms)
        ptr, estimate = (self.files.read(shard, name) for name in ("atom_ptr", "edge_estimate"))
        assert ptr is not None
        assert estimate is not None
        if ptr[0] != 0 or ptr[-1] != atoms or (np.diff(ptr) < 1).any():
            raise DataError(
                f"shard {self.files.paths[shard]}: atom_ptr does not divide its {atoms} atoms among {structures} "
                f"structures.\n{COPY_AGAIN}"
            )
        return ptr, estimate


def _read_manifests(directories: Sequence[Path]) -> list[Manifest]:
    if not directories:
        raise DataError("dataset: no path was given.\nName at least one directory that `dpt-hpc ingest` wrote.")
    manifests = [Manifest.read(directory) for directory in directories]
    refuse_twins(directories, manifests)
    return manifests

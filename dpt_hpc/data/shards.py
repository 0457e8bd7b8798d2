"""Datasets on disk: flat HDF5 arrays with row pointers, one hash per shard, a manifest written last.

A shard is readable with plain h5py. Atoms of all structures lie in one array; `atom_ptr` (S+1,) says where each
structure's begin:

    atom_ptr (S+1,) int64 · atomic_numbers (A,) uint8 · positions (A,3) Å · cell (S,3,3) Å, rows are lattice vectors ·
    pbc (S,3) bool · energy (S,) eV, total · forces (A,3) eV/Å · stress (S,3,3) eV/Å³, tension positive ·
    has_energy, has_forces, has_stress (S,) bool · properties/NAME (S,) with properties/has_NAME (S,) bool ·
    structure_id, group (S,) UTF-8 · edge_estimate (S,) int64

A label that no structure of the shard has is not written; where one structure lacks it, its rows are 0.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from dpt_hpc.data.columns import LABELS, Array, flat_columns, join_column
from dpt_hpc.data.joining import join_units, refuse_shared_ids, refuse_twins
from dpt_hpc.data.manifest import (
    COPY_AGAIN,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    UNITS,
    Manifest,
    Shard,
    publish,
    sha256_of,
    verify_shard,
)
from dpt_hpc.data.statistics import EDGE_CUTOFF, EDGE_FORMULA, EDGE_MAX_NEIGHBORS, Statistics
from dpt_hpc.errors import DataError, EnvironmentFault
from dpt_hpc.structure import SYMBOLS, Batch, Structure

CHUNK_ROWS = 4096
EDGE_ESTIMATE = {"cutoff": EDGE_CUTOFF, "max_neighbors": EDGE_MAX_NEIGHBORS, "formula": EDGE_FORMULA}
CHECK_DISK = "Check its permissions, and the space and quota of its disk."
HEAD = ("atom_ptr", "edge_estimate", "group", "structure_id")
"""Columns that are read when a dataset is opened."""
OURS = re.compile(r"shard_\d{5}\.h5(\.tmp)?|dataset\.json\.tmp")


def write_dataset(
    structures: Iterable[Structure],
    out: Path,
    *,
    provenance: Mapping[str, Any],
    property_units: Mapping[str, str] | None = None,
    shard_atoms: int = 500_000,
    dtype: Literal["float32", "float64"] = "float64",
    compression: Literal["gzip", "lzf"] | None = None,
) -> Manifest:
    """Write a dataset directory, one shard in memory at a time.

    structures: with distinct ids; read once. provenance: JSON-able; the shards state it as it is at the start, the
    manifest as it is at the end, when the caller may know more. property_units: of every property that occurs. dtype:
    of positions, forces and stress (cell, energy and properties stay float64). Every file is written under a temporary
    name, flushed and renamed, the manifest last: a killed run leaves nothing that `Dataset.open` accepts. Raises
    DataError if `out` holds a dataset or foreign files, if there is no structure, if a value is not finite, or if a
    property has no unit; EnvironmentFault if the disk does not take it.
    """
    out = Path(out)
    try:
        claim_directory(out)
    except OSError as error:
        raise EnvironmentFault(f"output {out}: cannot be written: {error}.\n{CHECK_DISK}") from None
    stated = json.dumps(provenance, ensure_ascii=False)
    statistics = Statistics()
    shards: list[Shard] = []
    block: list[Structure] = []
    atoms = 0
    options = {"dtype": dtype, "compression": compression}

    def flush() -> None:
        if block:
            shards.append(_write_shard(out, len(shards), block, stated, property_units or {}, options))
            block.clear()

    try:
        for structure in structures:
            statistics.show(structure)
            if block and atoms + structure.num_atoms > shard_atoms:
                flush()
                atoms = 0
            block.append(structure)
            atoms += structure.num_atoms
        flush()
        if not shards:
            raise DataError(
                f"dataset {out}: not one structure is left to write.\nLoosen the filters, or check the source."
            )
    except BaseException as error:
        _clear(out)
        if isinstance(error, OSError):
            raise EnvironmentFault(f"output {out}: cannot be written: {error}.\n{CHECK_DISK}") from error
        raise
    manifest = Manifest(
        num_structures=sum(s.num_structures for s in shards),
        num_atoms=sum(s.num_atoms for s in shards),
        shards=tuple(shards),
        property_units=dict(property_units or {}),
        edge_estimate=EDGE_ESTIMATE,
        statistics=statistics.summary(),
        provenance=provenance,
    )
    manifest.write(out)
    return manifest


def claim_directory(out: Path) -> None:
    """Make `out`, or clear what a killed ingest left in it. Raises DataError if it holds anything else."""
    if (out / MANIFEST_NAME).exists():
        raise DataError(f"output {out}: holds a dataset already.\nName another directory, or delete this one first.")
    if out.exists():
        found = sorted(path.name for path in out.iterdir()) if out.is_dir() else [out.name]
        foreign = [name for name in found if not OURS.fullmatch(name)]
        if foreign:
            raise DataError(
                f"output {out}: is not empty; it holds {', '.join(foreign[:3])}{' ...' if len(foreign) > 3 else ''}.\n"
                "Name a new directory."
            )
        _clear(out)
    out.mkdir(parents=True, exist_ok=True)


def _clear(out: Path) -> None:
    """Remove the files of an unfinished dataset, and the directory if nothing else is in it."""
    for path in list(out.iterdir()):
        if OURS.fullmatch(path.name):
            path.unlink()
    if not any(out.iterdir()):
        out.rmdir()


def _write_shard(
    out: Path,
    index: int,
    block: Sequence[Structure],
    provenance: str,
    property_units: Mapping[str, str],
    options: Mapping[str, Any],
) -> Shard:
    unitless = sorted({name for s in block for name in s.properties} - set(property_units))
    if unitless:
        raise DataError(f"dataset {out}: no unit is stated for property {', '.join(unitless)}.\nState it; 1 for none.")
    columns = flat_columns(block, options["dtype"])
    final = out / f"shard_{index:05d}.h5"
    temporary = final.with_name(final.name + ".tmp")
    with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["conventions"] = (__doc__ or "").strip()
        file.attrs["provenance"] = provenance
        for key, value in EDGE_ESTIMATE.items():
            file.attrs[f"edge_estimate_{key}"] = value
        for name, values in columns.items():
            _write_column(file, name, values, options["compression"])
            unit = UNITS.get(name) or property_units.get(name.removeprefix("properties/"))
            if unit is not None:
                file[name].attrs["units"] = unit
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    digest = sha256_of(temporary)
    size = temporary.stat().st_size
    publish(temporary, final)
    return Shard(final.name, digest, size, len(block), int(columns["atom_ptr"][-1]))


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


class Dataset:
    """One or several dataset directories, read as one sequence of structures.

    num_atoms (S,) int64 · edge_estimate (S,) int64 · groups (S,) str · structure_ids (S,) str · has_energy, has_forces,
    has_stress (S,) bool · elements: sorted atomic numbers · property_names, property_units · manifests, one per path.
    The columns of atoms are loaded at the first `read` or `get`, so that a process may fork before.
    """

    def __init__(self, directories: Sequence[Path], manifests: Sequence[Manifest]) -> None:
        self.manifests = tuple(manifests)
        self.property_units = join_units(directories, manifests)
        self.property_names = tuple(sorted(self.property_units))
        self._files = [d / shard.file for d, m in zip(directories, manifests, strict=True) for shard in m.shards]
        heads = [_read_shard(path, HEAD) for path in self._files]
        self.num_atoms = np.concatenate([np.diff(h["atom_ptr"]) for h in heads])
        self.edge_estimate = np.concatenate([h["edge_estimate"] for h in heads])
        self.groups = np.concatenate([h["group"] for h in heads])
        self.structure_ids = np.concatenate([h["structure_id"] for h in heads])
        masks = [_read_shard(path, [f"has_{label}" for label in LABELS]) for path in self._files]
        self.has_energy, self.has_forces, self.has_stress = (
            np.concatenate([m[f"has_{label}"] for m in masks]) for label in LABELS
        )
        symbols = {symbol for m in manifests for symbol in m.statistics["elements"]}
        self.elements = sorted(SYMBOLS.index(symbol) for symbol in symbols)
        self.atom_ptr = np.concatenate([[0], np.cumsum(self.num_atoms)]).astype(np.int64)
        self._columns: dict[str, Array] | None = None

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path], *, verify: bool = True) -> Dataset:
        """Open one or several dataset directories.

        verify: compare every shard's SHA-256 with the manifest (reads every byte once; do it once per run). Raises
        DataError if a directory, its manifest or a shard is missing, truncated, altered, empty or of another version,
        and if two directories hold the same data or the same structure_id: it would stand in training and test part.
        """
        directories = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
        if not directories:
            raise DataError("dataset: no path was given.\nName at least one directory that `dpt-hpc ingest` wrote.")
        manifests = [Manifest.read(directory) for directory in directories]
        for directory, manifest in zip(directories, manifests, strict=True):
            if manifest.num_structures == 0 or not manifest.shards:
                raise DataError(f"dataset {directory}: is empty (0 structures).\nIngest again with looser filters.")
        refuse_twins(directories, manifests)
        for directory, manifest in zip(directories, manifests, strict=True):
            for shard in manifest.shards:
                verify_shard(directory / shard.file, shard, verify)
        dataset = cls(directories, manifests)
        refuse_shared_ids(directories, [m.num_structures for m in manifests], dataset.structure_ids)
        return dataset

    def __len__(self) -> int:
        return len(self.num_atoms)

    def read(
        self, indices: Sequence[int] | Array, *, dtype: torch.dtype = torch.float32, target: str | None = None
    ) -> Batch:
        """The structures `indices` (B,), in that order, as one batch in `dtype`; `target` names a property."""
        index = np.asarray(indices, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"Dataset.read: indices {index.min()} to {index.max()}, expected 0 to {len(self) - 1}")
        if target is not None and target not in self.property_units:
            raise DataError(
                f"target is {target!r}, but the dataset has {', '.join(self.property_names) or 'no properties'}.\n"
                "Name one of them."
            )
        columns = self._load()
        count = self.num_atoms[index]
        atom_ptr = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        rows = np.arange(atom_ptr[-1]) + np.repeat(self.atom_ptr[index] - atom_ptr[:-1], count)

        def of(name: str, at: Array, shape: tuple[int, ...] = ()) -> torch.Tensor:
            if name in columns:
                return torch.from_numpy(columns[name][at]).to(dtype)
            return torch.zeros((len(at), *shape), dtype=dtype)

        def mask(present: Array | None) -> torch.Tensor:
            return torch.from_numpy(np.zeros(len(index), dtype=bool) if present is None else present[index])

        return Batch(
            positions=of("positions", rows),
            cell=of("cell", index),
            pbc=torch.from_numpy(columns["pbc"][index]),
            atomic_numbers=torch.from_numpy(columns["atomic_numbers"][rows].astype(np.int64)),
            atom_ptr=torch.from_numpy(atom_ptr),
            structure_index=torch.from_numpy(index.copy()),
            energy=of("energy", index),
            energy_mask=mask(self.has_energy),
            forces=of("forces", rows, (3,)),
            forces_mask=mask(self.has_forces),
            stress=of("stress", index, (3, 3)),
            stress_mask=mask(self.has_stress),
            target=of(f"properties/{target}", index),
            target_mask=mask(columns.get(f"properties/has_{target}")),
        )

    def get(self, index: int) -> Structure:
        """One structure with all its labels, in float64."""
        columns = self._load()
        atoms = slice(int(self.atom_ptr[index]), int(self.atom_ptr[index + 1]))

        def tensor(name: str, at: int | slice) -> torch.Tensor:
            return torch.from_numpy(np.array(columns[name][at], dtype=np.float64))

        return Structure(
            positions=tensor("positions", atoms),
            cell=tensor("cell", index),
            pbc=torch.from_numpy(columns["pbc"][index].copy()),
            atomic_numbers=torch.from_numpy(columns["atomic_numbers"][atoms].astype(np.int64)),
            energy=float(columns["energy"][index]) if self.has_energy[index] else None,
            forces=tensor("forces", atoms) if self.has_forces[index] else None,
            stress=tensor("stress", index) if self.has_stress[index] else None,
            properties={
                name: float(columns[f"properties/{name}"][index])
                for name in self.property_names
                if f"properties/{name}" in columns and columns[f"properties/has_{name}"][index]
            },
            structure_id=str(self.structure_ids[index]),
            group=str(self.groups[index]),
        )

    def property_values(self, name: str) -> NDArray[np.float64]:
        """(S,) values of a property in its unit; NaN where a structure lacks it."""
        columns = self._load()
        return np.where(columns[f"properties/has_{name}"], columns[f"properties/{name}"], np.nan)

    def _load(self) -> dict[str, Array]:
        if self._columns is None:
            shards = [_read_shard(path, without=HEAD) for path in self._files]
            names = sorted({name for shard in shards for name in shard})
            self._columns = {name: join_column(shards, name) for name in names}
        return self._columns


def _read_shard(path: Path, names: Iterable[str] | None = None, without: Sequence[str] = ()) -> dict[str, Array]:
    """Columns of a shard by name: `names`, or all but those in `without`."""
    columns: dict[str, Array] = {}

    def take(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and name not in without:
            values = node[()]
            columns[name] = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values

    try:
        with h5py.File(path, "r") as file:
            if names is None:
                file.visititems(take)
            else:
                for name in names:
                    take(name, file[name])
    except (OSError, KeyError, RuntimeError) as error:
        raise DataError(f"shard {path}: cannot be read: {error}.\n{COPY_AGAIN}") from None
    return columns

"""Readers on top of ASE (extended XYZ, databases, anything ASE reads) and of pymatgen's CIF parser.

ASE moves energy, forces and stress from the file's fields into a calculator; both places are searched, so no label is
lost. Its stress is that of the conventions here: eV/Å³, tension positive, 3x3 or Voigt.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.io.extxyz import read_xyz
from pymatgen.io.cif import CifParser

from dpt_hpc.data.ingest.json_readers import structure_arrays
from dpt_hpc.data.ingest.json_stream import open_text
from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.record import Broken, Record, RecordError, label_like, numeric, scalar, stated_units

KEYS = {"energy": "energy", "forces": "forces", "stress": "stress", "virial": "virial"}


def read_extxyz(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """Extended XYZ, two frames in memory at a time: one is known to be whole when a number of atoms follows it."""
    number = 0
    last: Record | Broken | None = None
    try:
        with open_text(path) as stream:
            while header := stream.readline():
                if not header.strip():
                    continue
                name = f"record {number}"
                if not header.strip().isdigit():
                    if isinstance(last, Record):
                        last = Broken(last.name, f"announces {len(last.numbers)} atoms, but no record follows them")
                    if last is not None:
                        yield last
                    found = header.strip()[:40]
                    yield _lost(name, f"starts with {found!r}, expected a number of atoms")
                    return
                lines = [stream.readline() for _ in range(int(header) + 1)]
                if last is not None:
                    yield last
                    last = None
                if not lines[-1]:
                    yield _lost(name, f"the file ends within the record: {int(header)} atoms were announced")
                    return
                last = _frame(name, header + "".join(lines), options)
                number += 1
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        if last is not None:
            yield last
        yield _lost(f"record {number}", f"cannot be read: {error}")
        return
    if last is not None:
        yield last


def _lost(name: str, reason: str) -> Broken:
    return Broken(name, f"{reason}; the rest of the file is not read", rest_lost=True)


def _frame(name: str, text: str, options: IngestOptions) -> Record | Broken:
    try:
        (atoms,) = read_xyz(io.StringIO(text), 0)
    except Exception as error:  # ASE raises whatever the text makes its parsers raise
        return Broken(name, f"is no extended XYZ: {type(error).__name__}: {error}")
    return _guarded(name, atoms, options)


def read_ase(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """Anything ASE reads: databases, trajectories, VASP and other codes' output."""
    number = 0
    try:
        for atoms in ase.io.iread(str(path), index=":"):
            yield _guarded(f"record {number}", atoms, options)
            number += 1
    except Exception as error:  # its many readers raise many things
        yield _lost(f"record {number}", f"ASE cannot read it: {type(error).__name__}: {error}")


def _guarded(name: str, atoms: Atoms, options: IngestOptions) -> Record | Broken:
    try:
        return from_atoms(name, atoms, options)
    except RecordError as error:
        return Broken(name, str(error))


def from_atoms(name: str, atoms: Atoms, options: IngestOptions) -> Record:
    """A record from ASE atoms, its labels from the calculator, info and arrays. Raises RecordError."""
    info = {**atoms.info, **(atoms.info.get("data") or {}), **(atoms.info.get("key_value_pairs") or {})}
    results = {k: v for k, v in (atoms.calc.results if atoms.calc is not None else {}).items() if v is not None}
    fields: Mapping[str, Any] = {**atoms.arrays, **info, **results}
    keys = {**KEYS, **options.label_keys}
    labels: dict[str, Any] = {}
    for label, key in keys.items():
        if fields.get(key) is not None:
            shape = {"energy": (), "forces": (-1, 3)}.get(label)
            value = numeric(fields[key], key, shape)
            labels[label] = float(value) if label == "energy" else value
    # ASE's own free_energy is the energy with the electronic entropy: another quantity, not an overlooked label.
    ignored = label_like(fields, [*keys.values(), *options.targets, "free_energy", "energies"])
    return Record(
        name,
        atoms.numbers.astype(np.int64),
        atoms.positions,
        np.asarray(atoms.cell),
        np.asarray(atoms.pbc, dtype=bool),
        **labels,
        properties={target: scalar(info[target], target) for target in options.targets if info.get(target) is not None},
        structure_id=_text(info.get(options.id_key or "structure_id")),
        group=_text(info.get(options.group_key)) if options.group_key else "",
        ignored=ignored,
        stated_units=stated_units(fields, keys),
        fields=tuple(key for key, value in info.items() if value is not None),
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def read_cif(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """A CIF file; each of its structures is a record. Partial occupancy is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rounding of coordinates to symmetric places
            structures = CifParser(str(path)).parse_structures(primitive=False)
    except Exception as error:  # the parser raises whatever the text makes it raise
        yield Broken("record 0", f"is no CIF that pymatgen reads: {type(error).__name__}: {error}")
        return
    for number, structure in enumerate(structures):
        name = f"record {number}"
        try:
            suffix = f":{number}" if len(structures) > 1 else ""
            yield Record(name, *structure_arrays(structure.as_dict()), structure_id=path.stem + suffix)
        except RecordError as error:
            yield Broken(name, str(error))

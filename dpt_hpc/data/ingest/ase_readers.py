"""Readers on top of ASE (extended XYZ, databases, anything ASE reads) and of pymatgen's CIF parser.

ASE moves energy, forces and stress from the file's fields into a calculator; both places are searched, so no label is
lost. Its stress is that of the conventions here: eV/Å³, tension positive, 3x3 or Voigt.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.io.extxyz import read_xyz
from pymatgen.core import Structure as Crystal
from pymatgen.io.cif import CifParser

from dpt_hpc.data.ingest.json_readers import structure_arrays
from dpt_hpc.data.ingest.json_stream import open_text
from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.record import Broken, Record, RecordError, label_like, numeric, scalar, stated_units

KEY = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\{[^}]*\}|\[[^]]*\]|(?<!\S)([A-Za-z_][\w-]*)\s*=""")
"""The keys of a comment line, but not those within a value, quoted or not (an address, ?id=1)."""
DATA_BLOCK = re.compile(r"^\s*data_", re.MULTILINE)
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
                count = header.strip()
                if not (count.isascii() and count.isdigit() and len(count) < 19):
                    if isinstance(last, Record):
                        last = Broken(last.name, f"announces {len(last.numbers)} atoms, but no record follows them")
                    if last is not None:
                        yield last
                    yield _lost(name, f"starts with {count[:40]!r}, expected a number of atoms")
                    return
                lines = list(islice(stream, int(count) + 1))  # no more than there are, whatever was announced
                if last is not None:
                    yield last
                    last = None
                if len(lines) <= int(count):
                    yield _lost(name, f"the file ends within the record: {int(count)} atoms were announced")
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
    keys = [key for key in KEY.findall(text.split("\n", 2)[1]) if key]
    if len(set(keys)) < len(keys):
        return Broken(name, f"has {next(key for key in keys if keys.count(key) > 1)} twice")
    try:
        (atoms,) = read_xyz(io.StringIO(text), 0)
    except Exception as error:  # ASE raises whatever the text makes its parsers raise
        return Broken(name, f"is no extended XYZ: {type(error).__name__}: {error}")
    return _guarded(name, atoms, options)


def read_ase(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """Anything ASE reads: databases, trajectories, VASP and other codes' output."""
    number = 0
    try:
        for atoms in ase.io.iread(str(path), index=":", do_not_split_by_at_sign=True):
            yield _guarded(f"record {number}", atoms, options)
            number += 1
    except Exception as error:  # its many readers raise many things
        yield _lost(f"record {number}", f"ASE cannot read it: {type(error).__name__}: {error}")


def _guarded(name: str, atoms: Atoms, options: IngestOptions) -> Record | Broken:
    try:
        return from_atoms(name, atoms, options)
    except RecordError as error:
        return Broken(name, str(error))
    except (AttributeError, ArithmeticError, TypeError, ValueError, LookupError) as error:
        return Broken(name, f"is not of this format: {type(error).__name__}: {error}")


def from_atoms(name: str, atoms: Atoms, options: IngestOptions) -> Record:
    """A record from ASE atoms, its labels from the calculator, info and arrays. Raises RecordError."""
    nested = (atoms.info.get(key) for key in ("data", "key_value_pairs"))  # of a database
    info = {**atoms.info, **{k: v for part in nested if isinstance(part, Mapping) for k, v in part.items()}}
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
    """A CIF file; each of its data blocks with atoms is a record. Partial occupancy is refused."""
    try:
        with open_text(path, errors="replace") as stream:  # names of authors are in any encoding
            text = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        yield _lost("record 0", f"cannot be read: {error}")
        return
    # Block by block: pymatgen leaves out a block that it cannot read, and the first of two that have one name.
    blocks = [block for block in DATA_BLOCK.split(f"x\n{text}")[1:] if "_atom_site_" in block]
    if not blocks:
        yield Broken("record 0", "is no CIF that pymatgen reads: no data_ block with an _atom_site_ loop")
    for number, block in enumerate(blocks):
        name = f"record {number}"
        try:
            suffix = f":{number}" if len(blocks) > 1 else ""
            yield Record(name, *structure_arrays(_crystal(block).as_dict()), structure_id=path.stem + suffix)
        except RecordError as error:
            yield Broken(name, str(error))


def _crystal(block: str) -> Crystal:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rounding of coordinates to symmetric places
            parser = CifParser(io.StringIO(f"data_{block}"))
            (crystal,) = parser.parse_structures(primitive=False, on_error="raise")
    except Exception as error:  # the parser raises whatever the text makes it raise
        raise RecordError(f"is no CIF that pymatgen reads: {type(error).__name__}: {error}") from None
    return crystal

"""The formats: their readers, the units that each states for its labels, and how a file's format is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from dpt_hpc.data.ingest.ase_readers import read_ase, read_cif, read_extxyz
from dpt_hpc.data.ingest.csv_tables import read_csv
from dpt_hpc.data.ingest.json_readers import read_matdeeplearn, read_mlearn, read_mptrj, read_pymatgen
from dpt_hpc.data.ingest.json_stream import JsonError, stream_items
from dpt_hpc.data.ingest.matbench import read_matbench
from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.pickles import read_mpf_pickle
from dpt_hpc.data.ingest.record import Broken, Record
from dpt_hpc.data.ingest.units import (
    ENERGY_KINDS,
    ENERGY_UNITS,
    FORCES_UNITS,
    STRESS_SIGNS,
    STRESS_UNITS,
    Units,
)
from dpt_hpc.errors import ConfigError, DataError, did_you_mean

Reader = Callable[[Path, IngestOptions], Iterator[Record | Broken]]


@dataclass(frozen=True)
class Format:
    """A reader and the conventions of its files; stress_stated is False where the format has none for stress."""

    reader: Reader
    units: Units
    stress_stated: bool = True


VASP = Units(stress_unit="kbar", stress_sign="compression_positive")
FORMATS: Mapping[str, Format] = {
    "extxyz": Format(read_extxyz, Units()),
    "ase": Format(read_ase, Units()),
    "cif": Format(read_cif, Units()),
    "csv": Format(read_csv, Units()),
    "pymatgen": Format(read_pymatgen, Units(), stress_stated=False),
    "matdeeplearn": Format(read_matdeeplearn, Units(), stress_stated=False),
    "matbench": Format(read_matbench, Units()),
    "mlearn": Format(read_mlearn, VASP),
    "mptrj": Format(read_mptrj, VASP),
    "mpf-pickle": Format(read_mpf_pickle, VASP),
}
SUFFIXES = {
    ".xyz": "extxyz",
    ".extxyz": "extxyz",
    ".cif": "cif",
    ".mcif": "cif",
    ".p": "mpf-pickle",
    ".pkl": "mpf-pickle",
    ".pickle": "mpf-pickle",
    ".json": "json",
    ".traj": "ase",
    ".db": "ase",
}
VASP_OUTPUT = ("*OUTCAR*", "*vasprun*.xml*")
"""Names without a telling suffix; ASE knows them too."""


def detect_format(path: Path) -> str:
    """The format of a file, from its name and, for JSON, from its first item. Raises DataError if none fits."""
    if path.name.lower().endswith((".csv", ".csv.gz")):  # a table is read where it is named: in a folder, its files are
        return "csv"
    found = format_of_name(path) or "ase"
    return _json_format(path) if found == "json" else found


def format_of_name(path: Path) -> str | None:
    """What a file's name tells: a format, "json" for any of those, or None."""
    if any(fnmatch(path.name, pattern) for pattern in VASP_OUTPUT):
        return "ase"
    return SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _json_format(path: Path) -> str:
    try:
        head = list(islice(stream_items(path), 1))
    except JsonError as error:
        raise DataError(f"{path}: {error}.\nCheck that the file is whole; --format names its format.") from None
    if not head:
        raise DataError(f"{path}: is empty.\nCheck the file.")
    key, item = head[0]
    if key in ("index", "columns") and isinstance(item, list):
        return "matbench"
    if key is not None and not isinstance(item, Mapping):
        item = {key: item, **_first_fields(path)}
        key = None
    if isinstance(item, Mapping):
        fields = set(item)
        if {"positions", "atomic_numbers"} <= fields:
            return "matdeeplearn"
        if isinstance(item.get("atoms"), Mapping) and "lattice_mat" in item["atoms"]:
            return "mlearn"
        if {"lattice", "sites"} <= fields or "structure" in fields or key in ("lattice", "structure", "composition"):
            return "pymatgen"
        if {"numbers", "positions"} <= fields:
            return "ase"
        inner: Any = next(iter(item.values()), None)
        if key is not None and isinstance(inner, Mapping) and "structure" in inner:
            return "mptrj"
        found = ", ".join(map(str, list(item)[:8]))
    else:
        found = type(item).__name__
    raise DataError(
        f"{path}: no known JSON format has records like its first (it holds {found}).\n"
        f"Name the format: --format {'|'.join(FORMATS)}."
    )


def _first_fields(path: Path) -> dict[str | None, Any]:
    """Those that can be read; what comes of the rest is for the reader of the format to say."""
    found: dict[str | None, Any] = {}
    try:
        for key, value in islice(stream_items(path), 64):
            found[key] = value
    except JsonError:
        pass
    return found


def resolve_units(name: str, options: IngestOptions) -> Units:
    """The format's units with what the user states in their place. Raises ConfigError for an unknown unit."""
    default = FORMATS[name].units
    chosen = {}
    for option, known in (
        ("energy_kind", ENERGY_KINDS),
        ("energy_unit", ENERGY_UNITS),
        ("forces_unit", FORCES_UNITS),
        ("stress_unit", STRESS_UNITS),
        ("stress_sign", STRESS_SIGNS),
    ):
        value = getattr(options, option)
        if value is not None and value not in known:
            near = did_you_mean(value, known)
            raise ConfigError(f"--{option.replace('_', '-')} is {value!r}, expected one of {', '.join(known)}.{near}")
        chosen[option] = value or getattr(default, option)
    return Units(**chosen)


def stress_is_stated(name: str, options: IngestOptions) -> bool:
    """Whether unit and sign of the stress are known, from the format or from the user."""
    return FORMATS[name].stress_stated or (options.stress_unit is not None and options.stress_sign is not None)

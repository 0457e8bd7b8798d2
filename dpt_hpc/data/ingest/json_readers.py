"""Readers of JSON: MatDeepLearn, mlearn, pymatgen and MPtrj. All stream the outermost list or object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dpt_hpc.data.ingest.json_stream import JsonError, stream_items
from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.record import Broken, Record, RecordError, flags, label_like, numeric, scalar, stated_units
from dpt_hpc.structure import SYMBOLS

Json = Mapping[str, Any]
ATOMIC_NUMBERS = {symbol: z for z, symbol in enumerate(SYMBOLS) if z} | {"D": 1, "T": 1}


def read_matdeeplearn(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """A list of {structure_id, positions (Cartesian Å), cell, atomic_numbers, y: [..] or named targets}.

    Targets: the keys NAME or y_NAME of `options.targets`, or the entries of y in the order in which they are named.
    energy, forces, stress and pbc are taken where they are. The first record may name the targets itself, in
    `property_units`: {NAME: UNIT} (see `stated_targets`).
    """
    yield from _each(path, lambda name, raw: _matdeeplearn(name, raw, options))


def stated_targets(path: Path) -> dict[str, str]:
    """Names and units of the targets that the first record of a MatDeepLearn file states; empty if it does not."""
    try:
        first = next((item for _, item in stream_items(path)), None)
    except JsonError:
        return {}
    stated = first.get("property_units") if isinstance(first, Mapping) else None
    return {str(k): str(v) for k, v in stated.items()} if isinstance(stated, Mapping) else {}


def _matdeeplearn(name: str, raw: Json, options: IngestOptions) -> Record:
    return Record(
        name,
        integers(_field(raw, "atomic_numbers")),
        numeric(_field(raw, "positions"), "positions", (-1, 3)),
        numeric(_field(raw, "cell"), "cell", (3, 3)),
        pbc=flags(raw.get("pbc", (True, True, True)), "pbc"),
        **_labels(raw, options),
        properties=targets_of(raw, options.targets),
        structure_id=_text(raw, options.id_key or "structure_id"),
        group=_text(raw, options.group_key) if options.group_key else "",
    )


def read_mlearn(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """A list of {jid, atoms (JARVIS: lattice_mat, coords, elements, cartesian), energy (total), forces, stresses}.

    `energy` is the total energy of the cell; `total_energy`, in spite of its name, the energy per atom: not read.
    """
    yield from _each(path, lambda name, raw: _mlearn(name, raw, options))


def _mlearn(name: str, raw: Json, options: IngestOptions) -> Record:
    atoms = _field(raw, "atoms")
    cell = numeric(_field(atoms, "lattice_mat"), "lattice_mat", (3, 3))
    coordinates = numeric(_field(atoms, "coords"), "coords", (-1, 3))
    cartesian = atoms.get("cartesian", False)
    if not isinstance(cartesian, bool):
        raise RecordError(f"cartesian: is {cartesian!r:.60}, expected true or false")
    return Record(
        name,
        elements(_field(atoms, "elements")),
        coordinates if cartesian else coordinates @ cell,
        cell,
        **_labels(raw, options, {"stress": "stresses"}),
        properties=targets_of(raw, options.targets),
        structure_id=_text(raw, options.id_key or "jid"),
        group=_text(raw, options.group_key) if options.group_key else "",
    )


def read_pymatgen(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """A Structure or ComputedStructureEntry as dict, or a list or object of them.

    Labels: energy (a ComputedStructureEntry's is uncorrected), forces and stress beside `structure`, or in the
    structure's own properties.
    """
    pairs = stream_items(path)
    try:
        key, value = next(pairs, (None, None))
        if (key is not None and not isinstance(value, Mapping)) or key in ("lattice", "structure", "composition"):
            # One object, not a collection of them: it is small.
            yield from _guarded(
                "record 0", lambda: _pymatgen("record 0", {str(key): value, **{str(k): v for k, v in pairs}}, options)
            )
            return
    except JsonError as error:
        yield _lost("record 0", error)
        return
    yield from _each(path, lambda name, raw: _pymatgen(name, raw, options))


def _pymatgen(name: str, raw: Json, options: IngestOptions) -> Record:
    structure = raw.get("structure", raw)
    beside = {**(structure.get("properties") or {}), **(raw if "structure" in raw else {})}
    return Record(
        name,
        *structure_arrays(structure),
        **_labels(beside, options),
        properties=targets_of({**(raw.get("data") or {}), **beside}, options.targets),
        structure_id=_text(beside, options.id_key) if options.id_key else _text(raw, "entry_id"),
        group=_text(beside, options.group_key) if options.group_key else "",
    )


def read_mptrj(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """{material: {frame: {structure, uncorrected_total_energy, force, stress, ...}}}, one material in memory at a time.

    `options.energy_key` may name corrected_total_energy instead.
    """
    keys = {"energy": "uncorrected_total_energy", "forces": "force", "stress": "stress"}

    def frame(name: str, raw: Json) -> Record:
        labels = _labels(raw, options, keys)
        return Record(
            name,
            *structure_arrays(_field(raw, "structure")),
            **labels,
            properties=targets_of(raw, options.targets),
            structure_id=_text(raw, options.id_key) or name,
            group=_text(raw, options.group_key) if options.group_key else "",
        )

    try:
        for material, frames in stream_items(path):
            if not isinstance(frames, Mapping):
                yield Broken(str(material), f"is {type(frames).__name__}, expected an object of frames")
                continue
            for key, raw in frames.items():
                name = f"{material}/{key}"
                yield from _guarded(name, lambda name=name, raw=raw: frame(name, raw))
    except JsonError as error:
        yield _lost("end of file", error)


def structure_arrays(structure: Json) -> tuple[Any, Any, Any, Any]:
    """(numbers, positions, cell, pbc) of a pymatgen Structure as dict. Raises RecordError for partial occupancy."""
    lattice = _field(structure, "lattice")
    cell = numeric(_field(lattice, "matrix"), "lattice.matrix", (3, 3))
    numbers: list[Any] = []
    coordinates: list[Any] = []
    for site in _field(structure, "sites"):
        species = _field(site, "species")
        if len(species) != 1 or not abs(float(species[0].get("occu", 1)) - 1) <= 1e-6:
            raise RecordError(f"site {len(numbers)} is disordered (partial occupancy): {species}")
        numbers.append(species[0].get("element"))
        coordinates.append(_field(site, "abc"))
    pbc = flags(lattice.get("pbc") or (True, True, True), "lattice.pbc")
    return elements(numbers), numeric(coordinates, "abc", (-1, 3)).reshape(-1, 3) @ cell, cell, pbc


def elements(symbols: Any) -> Any:
    """Atomic numbers of chemical symbols. Raises RecordError for an unknown one."""
    if not isinstance(symbols, (list, tuple)):
        raise RecordError(f"elements: is {symbols!r:.60}, expected a list of symbols")
    unknown = [s for s in symbols if s not in ATOMIC_NUMBERS]
    if unknown:
        raise RecordError(f"{unknown[0]!r} is no element")
    return np.array([ATOMIC_NUMBERS[s] for s in symbols], dtype=np.int64)


def integers(values: Any) -> Any:
    """Atomic numbers as int64; fractions are refused."""
    array = numeric(values, "atomic_numbers", (-1,))
    whole = np.where(np.isfinite(array), array, -1).astype(np.int64)
    if (whole != array).any():
        raise RecordError(f"atomic_numbers: {values!r:.60} are not whole numbers")
    return whole


def _each(path: Path, parse: Any) -> Iterator[Record | Broken]:
    numbers = count()
    try:
        for key, raw in stream_items(path):
            name = f"record {next(numbers)}" + (f" ({key})" if key is not None else "")
            yield from _guarded(name, lambda name=name, raw=raw: parse(name, raw))
    except JsonError as error:
        yield _lost(f"record {next(numbers)}", error)


def _lost(name: str, error: JsonError) -> Broken:
    return Broken(name, f"{error}; the rest of the file is not read", rest_lost=True)


def _guarded(name: str, parse: Any) -> Iterator[Record | Broken]:
    try:
        yield parse()
    except RecordError as error:
        yield Broken(name, str(error))
    except (AttributeError, ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
        yield Broken(name, f"is not of this format: {type(error).__name__}: {error}")


def _field(raw: Json, key: str) -> Any:
    if not isinstance(raw, Mapping):
        raise RecordError(f"is {type(raw).__name__}, expected an object with {key}")
    if key not in raw:
        raise RecordError(f"{key} is missing (found {', '.join(map(str, list(raw)[:8]))})")
    return raw[key]


def _text(raw: Json, key: str | None) -> str:
    return "" if key is None or raw.get(key) is None else str(raw[key])


def _labels(raw: Json, options: IngestOptions, keys: Mapping[str, str] | None = None) -> dict[str, Any]:
    names = {"energy": "energy", "forces": "forces", "stress": "stress", **(keys or {}), **options.label_keys}
    shapes: dict[str, tuple[int, ...] | None] = {"energy": (), "forces": (-1, 3), "stress": None}
    found: dict[str, Any] = {}
    for label, key in names.items():
        if raw.get(key) is not None:
            value = numeric(raw[key], key, shapes[label])
            found[label] = float(value) if label == "energy" else value
    unread = label_like(raw, [*names.values(), *options.targets, *(f"y_{t}" for t in options.targets)])
    if options.targets and not any(t in raw or f"y_{t}" in raw for t in options.targets):
        unread = tuple(key for key in unread if key != "y")  # read by position
    stated = stated_units(raw, names)
    return {
        **found,
        "ignored": unread,
        "stated_units": stated,
        "fields": tuple(k for k, v in raw.items() if v is not None),
    }


def targets_of(raw: Json, targets: Mapping[str, str]) -> dict[str, float]:
    """The named targets that a record has."""
    named = {name: raw[key] for name in targets for key in (name, f"y_{name}") if raw.get(key) is not None}
    if not named and targets and raw.get("y") is not None:
        values = numeric(raw["y"], "y").reshape(-1)
        if len(values) != len(targets):
            raise RecordError(f"y has {len(values)} entries, but the targets named are {', '.join(targets)}")
        named = dict(zip(targets, values, strict=True))
    return {name: scalar(value, name) for name, value in named.items()}

"""Readers of structure files: what a good file of each format is, and what must hold of all that is read from it."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import crystals
import numpy as np
from fuzzing import Kind

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import DptError
from dpt_hpc.structure import Structure


@dataclass(frozen=True)
class Reader:
    """make: writes a good file, and all that it needs, into an empty folder; returns the file. read: reads it as the
    program does. costly: reading takes longer than most. names_file: whether the message must name it,
    or its folder."""

    name: str
    kind: Kind
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    costly: bool = False
    names_file: bool = True

    def outcome(self, file: Path, content: bytes) -> str:
        """Reads `file` with this `content`: "refused" or "accepted". Raises whatever else comes of it."""
        file.write_bytes(content)
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                self.read(file)
        except DptError as error:
            message = str(error)
            assert message.strip(), "an empty message"
            named = any(place.name in message for place in (file, file.parent, file.parent.parent))
            assert named or not self.names_file, f"the message names neither {file.name} nor its folder: {message}"
            return "refused"
        return "accepted"


def valid(structure: Structure) -> None:
    n = structure.num_atoms
    assert n > 0
    assert structure.positions.shape == (n, 3)
    assert structure.cell.shape == (3, 3)
    assert bool(((structure.atomic_numbers > 0) & (structure.atomic_numbers < 119)).all())
    assert structure.volume > 0
    labels = (structure.forces, structure.stress)
    for tensor in (structure.positions, structure.cell, *(label for label in labels if label is not None)):
        assert bool(tensor.isfinite().all())
    assert structure.forces is None or structure.forces.shape == (n, 3)
    assert structure.stress is None or structure.stress.shape == (3, 3)
    assert structure.energy is None or math.isfinite(structure.energy)
    assert all(map(math.isfinite, structure.properties.values()))


def seen(structure: Structure) -> tuple[float, ...]:
    """What tells a structure from others, rounded."""
    energy = structure.energy or 0.0
    return tuple(round(float(x), 6) for x in (energy, *structure.positions.flatten(), *structure.cell.flatten()))


INGEST = IngestOptions(stress_unit="kbar", stress_sign="compression_positive", skip_broken=True)


def ingested(file: Path, options: IngestOptions) -> list[Structure]:
    out = file.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    report = ingest([file], out, options)
    for source in report.sources:
        assert source.records == source.kept + sum(source.dropped.values()), "records were lost without a word"
    dataset = Dataset.open(out)
    assert len(dataset) == sum(source.kept for source in report.sources)
    structures = [dataset.get(i) for i in range(len(dataset))]
    for structure in structures:
        valid(structure)
    return structures


def records_of(content: bytes) -> list[str] | None:
    """The records of a list in JSON as text; None for anything else."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return [json.dumps(item, sort_keys=True) for item in tree] if isinstance(tree, list) else None


def ingests(
    name: str, kind: Kind, write: Callable[[Path, Any], Path], options: IngestOptions = INGEST, **more: Any
) -> Reader:
    good: dict[str, tuple[float, ...]] = {}

    def make(folder: Path) -> Path:
        items = crystals.crystals(5)
        file = write(folder, items)
        found = ingested(file, options)
        assert len(found) == len(items)
        records = records_of(file.read_bytes()) or []
        good.update(zip(records, map(seen, found), strict=False))
        return file

    def read(file: Path) -> None:
        found = {seen(structure) for structure in ingested(file, options)}
        for record in records_of(file.read_bytes()) or []:
            assert record not in good or good[record] in found, "a record that nobody touched is lost or changed"

    return Reader(f"ingest: {name}", kind, make, read, **more)


def write_cif(folder: Path, items: Any) -> Path:
    texts = [crystals.as_pymatgen(atoms).to(fmt="cif") for atoms in items]
    (folder / "some.cif").write_text("\n".join(texts))
    return folder / "some.cif"


def write_matbench(folder: Path, items: Any) -> Path:
    rows = [[crystals.as_pymatgen(atoms).as_dict(), float(i)] for i, atoms in enumerate(items)]
    content = {"index": list(range(len(rows))), "columns": ["structure", "gap"], "data": rows}
    return crystals.dump(folder / "matbench_some.json", content)


def write_table(folder: Path, items: Any) -> Path:
    names = [f"{i}.cif" for i in range(len(items))]
    for name, atoms in zip(names, items, strict=True):
        crystals.as_pymatgen(atoms).to(filename=str(folder / name), fmt="cif")
    (folder / "table.csv").write_text("file,gap\n" + "".join(f"{name},{i}.5\n" for i, name in enumerate(names)))
    return folder / "table.csv"


def gzipped(write: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
    def packed(folder: Path, items: Any) -> Path:
        file = write(folder, items)
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        return folder / f"{file.name}.gz"

    return packed


EV = replace(INGEST, stress_unit=None, stress_sign=None)
INGESTS = (
    ingests("extended XYZ", "text", crystals.write_extxyz, EV),
    ingests("extended XYZ, gzip", "bytes", gzipped(crystals.write_extxyz), EV),
    ingests("CIF", "text", write_cif, EV, costly=True),
    ingests("ASE database", "bytes", crystals.write_db, EV),
    ingests("ASE trajectory", "bytes", crystals.write_traj, EV),
    ingests("ASE JSON", "json", crystals.write_ase_json, EV),
    ingests("pymatgen JSON", "json", crystals.write_pymatgen),
    ingests("MatDeepLearn JSON", "json", crystals.write_matdeeplearn),
    ingests("MatDeepLearn JSON, gzip", "bytes", gzipped(crystals.write_matdeeplearn)),
    ingests("mlearn JSON", "json", crystals.write_mlearn, EV),
    ingests("MPtrj JSON", "json", crystals.write_mptrj, EV),
    ingests("MPF pickle", "bytes", crystals.write_pickle, EV),
    ingests("MPF pickle, protocol 2", "bytes", partial(crystals.write_pickle, protocol=2), EV),
    ingests("Matbench table", "json", write_matbench, replace(EV, targets={"gap": "eV"})),
    ingests("table of files", "text", write_table, replace(EV, targets={"gap": "eV"}), costly=True),
)

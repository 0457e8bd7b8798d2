"""Predictions on disk: extended XYZ, CSV or JSON, written structure by structure, seen under their name only whole."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from dpt_hpc import __version__
from dpt_hpc.errors import ConfigError
from dpt_hpc.structure import SYMBOLS, Structure
from dpt_hpc.use.model import Model
from dpt_hpc.use.predicted import Predicted

VOIGT = {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "yz": (1, 2), "xz": (0, 2), "xy": (0, 1)}


class Writer(Protocol):
    """Takes one structure after the other."""

    def write(self, structure: Structure, predicted: Predicted) -> None:
        """Append one."""

    def close(self) -> None:
        """Write what stands at the end."""


@contextmanager
def writing(path: Path, model: Model) -> Iterator[Writer]:
    """A writer for `path`, by its suffix: .extxyz or .xyz, .csv, .json.

    It writes to a hidden file beside `path`, which takes that name when all is well, and is removed otherwise. Raises
    ConfigError for another suffix.
    """
    kind = check_suffix(path)
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = kind(stream, model)
            yield writer
            writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class ExtendedXYZ:
    """What ASE, OVITO and `dpt-hpc ingest` read: energy and stress in the header, forces and energies at the atoms."""

    def __init__(self, stream: TextIO, model: Model) -> None:
        self.stream = stream

    def write(self, structure: Structure, predicted: Predicted) -> None:
        columns = [[SYMBOLS[z] for z in structure.atomic_numbers.tolist()]]
        columns += [_texts(structure.positions.T[k]) for k in range(3)]
        layout = "species:S:1:pos:R:3"
        for name in ("forces", "noise"):
            values = getattr(predicted, name)
            if values is not None:
                layout += f":{name}:R:3"
                columns += [_texts(values[:, k]) for k in range(3)]
        if predicted.energies is not None:
            layout += ":energies:R:1"
            columns.append(_texts(predicted.energies))
        header = [f'Lattice="{" ".join(_texts(structure.cell.flatten()))}"'] if bool(structure.cell.any()) else []
        header += [f"Properties={layout}", f"structure_id={_quoted(predicted.structure_id)}"]
        header += [] if predicted.energy is None else [f"energy={predicted.energy:.12g}"]
        header += [] if predicted.stress is None else [f'stress="{" ".join(_texts(predicted.stress.flatten()))}"']
        header += [f"{_key(name)}={value:.12g}" for name, value in predicted.properties.items()]
        header += [f'pbc="{" ".join("T" if axis else "F" for axis in structure.pbc.tolist())}"']
        self.stream.write(f"{structure.num_atoms}\n{' '.join(header)}\n")
        self.stream.writelines(" ".join(row) + "\n" for row in zip(*columns, strict=True))

    def close(self) -> None:
        pass


class Table:
    """A row per structure: energies, largest force, stress, properties. Numbers of atoms are in the other formats."""

    def __init__(self, stream: TextIO, model: Model) -> None:
        self.writer = csv.writer(stream, lineterminator="\n")
        names = ["structure_id", "formula", "num_atoms"]
        if model.gives == "energy":
            names += ["energy_eV", "energy_per_atom_eV", "largest_force_eV_per_A"]
            names += [f"stress_{name}_eV_per_A3" for name in VOIGT]
        elif model.gives == "noise":
            names += ["root_mean_square_noise_A"]
        else:
            names += [f"{name} ({unit})" for name, unit in model.units.items()]
        self.gives = model.gives
        self.writer.writerow([*names, "warnings"])

    def write(self, structure: Structure, predicted: Predicted) -> None:
        row: list[Any] = [_plain_cell(predicted.structure_id), formula(structure), predicted.num_atoms]
        if self.gives == "energy":
            forces, stress = predicted.forces, predicted.stress
            energy = predicted.energy or 0.0
            row += [f"{energy:.10g}", f"{energy / predicted.num_atoms:.10g}"]
            row.append("" if forces is None else f"{float(((forces**2).sum(1) ** 0.5).max()):.8g}")
            row += ["" if stress is None else f"{float(stress[place]):.8g}" for place in VOIGT.values()]
        elif self.gives == "noise" and predicted.noise is not None:
            row.append(f"{float((predicted.noise**2).sum(1).mean() ** 0.5):.8g}")
        else:
            row += [f"{value:.10g}" for value in predicted.properties.values()]
        self.writer.writerow([*row, "; ".join(predicted.warnings)])

    def close(self) -> None:
        pass


class Json:
    """One object: the model, the units, and a list of structures with all their numbers, one on a line."""

    def __init__(self, stream: TextIO, model: Model) -> None:
        self.stream, self.count = stream, 0
        head = {"dpt_hpc": __version__, "model": str(model.path), "network": model.card.options.name}
        text = json.dumps({**head, "units": model.units}, ensure_ascii=False)
        stream.write(f'{text[:-1]}, "structures": [')

    def write(self, structure: Structure, predicted: Predicted) -> None:
        found = predicted.as_json()
        record = {"structure_id": found.pop("structure_id"), "formula": formula(structure), **found}
        self.stream.write(f"{',' if self.count else ''}\n{json.dumps(record, ensure_ascii=False, allow_nan=False)}")
        self.count += 1

    def close(self) -> None:
        self.stream.write("\n]}\n")


FORMATS: Mapping[str, type[ExtendedXYZ] | type[Table] | type[Json]] = {
    ".extxyz": ExtendedXYZ,
    ".xyz": ExtendedXYZ,
    ".csv": Table,
    ".json": Json,
}


def check_suffix(path: Path) -> type[ExtendedXYZ] | type[Table] | type[Json]:
    """What writes a file of this name. Raises ConfigError if nothing does."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {path}: expected a name that ends with {', '.join(FORMATS)}.")
    return FORMATS[path.suffix.lower()]


def formula(structure: Structure) -> str:
    """Elements in alphabetical order, each with its number of atoms."""
    counts = structure.atomic_numbers.bincount().tolist()
    parts = sorted((SYMBOLS[z], n) for z, n in enumerate(counts) if n)
    return "".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in parts)


def _texts(values: Any) -> list[str]:
    return [f"{value:.10g}" for value in values.tolist()]


def _quoted(text: str) -> str:
    """A value that stays one word: quotes and line breaks of an id would end it early."""
    clean = "".join(c if c.isprintable() else " " for c in text).replace("\\", "/").replace('"', "'")
    return f'"{clean}"'


def _key(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _plain_cell(text: str) -> str:
    """An id that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text

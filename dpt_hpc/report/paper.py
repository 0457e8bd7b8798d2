"""The paper's published errors (Jia et al., Digital Discovery 2024, 3, 586; Tables 2-5), looked up by dataset."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

PRETRAINING_STRUCTURES = 187_687
"""MPF.2021.2.8, on which every pre-trained row with forces was pre-trained."""

DENOISING_STRUCTURES = 62_783
"""The relaxed structures among them, on which the denoising rows were pre-trained."""


PRETRAINING_EPOCHS = 100
"""Of every pre-training in Tables 2 to 4."""


@dataclass(frozen=True)
class Protocol:
    """How many seeds and epochs a fine-tuning has, and the fractions for training, validation and test."""

    seeds: int
    epochs: int
    split: tuple[float, float, float]


PROTOCOL = Protocol(seeds=5, epochs=200, split=(0.6, 0.2, 0.2))
"""How the paper fine-tuned (its section 3.2)."""


@dataclass(frozen=True)
class PaperSet:
    """One of the paper's fine-tuning sets: its column, its size, and the unit of its errors."""

    column: str
    structures: int
    unit: str
    aliases: tuple[str, ...]


SETS = (
    PaperSet("JDFT", 636, "meV/atom", ("jdft", "jdft2d", "matbenchjdft2d")),
    PaperSet("Phonons", 1265, "1/cm", ("phonons", "phonon", "matbenchphonons")),
    PaperSet("Dielectric", 4764, "", ("dielectric", "matbenchdielectric")),
    PaperSet("GVRH", 10987, "log10(GPa)", ("gvrh", "loggvrh", "matbenchloggvrh")),
    PaperSet("KVRH", 10987, "log10(GPa)", ("kvrh", "logkvrh", "matbenchlogkvrh")),
    PaperSet("Perovskites", 18928, "eV/cell", ("perovskites", "perovskite", "matbenchperovskites")),
    PaperSet("2D", 3814, "eV", ("2d", "workfunction2d", "workfunction", "c2db", "2dworkfunction")),
    PaperSet("MOF", 13058, "eV", ("mof", "qmof")),
    PaperSet("Surface", 37334, "eV", ("surface", "surfaces")),
    PaperSet("MP_gap", 106113, "eV", ("mpgap", "matbenchmpgap")),
    PaperSet("MP_form", 132752, "eV/atom", ("mpform", "mpeform", "matbenchmpeform")),
)

UNITS = {
    "mev/atom": "meV/atom",
    "mevperatom": "meV/atom",
    "1/cm": "1/cm",
    "cm^-1": "1/cm",
    "cm-1": "1/cm",
    "cm⁻¹": "1/cm",
    "ev": "eV",
    "ev/cell": "eV/cell",
    "evpercell": "eV/cell",
    "ev/atom": "eV/atom",
    "log10(gpa)": "log10(GPa)",
    "log10gpa": "log10(GPa)",
    "": "",
    "1": "",
    "dimensionless": "",
}

TABLES = {
    ("cgcnn", "add"): "2_cgcnn_add",
    ("torchmd_et", "add"): "3_torchmd_add",
    ("torchmd", "add"): "3_torchmd_add",
    ("cgcnn", "mean"): "4_cgcnn_mean",
}


@dataclass(frozen=True)
class PaperReference:
    """What the paper reports for one dataset, network and pooling: mean test errors over 5 seeds.

    rows: pre-training -> MAE in `unit`, "baseline" among them. by_epochs: the same from Table 5, for other lengths of
    pre-training (CGCNN with add pooling only).
    """

    dataset: PaperSet
    table: int
    rows: Mapping[str, float]
    by_epochs: Mapping[int, Mapping[str, float]]

    @property
    def baseline(self) -> float:
        return self.rows["baseline"]

    def of(self, row: str, epochs: int | None = None) -> tuple[float, int] | None:
        """MAE and the number of its table; None where the paper has no such row, or not of this length.

        epochs: of the pre-training; 100 is that of Tables 2 to 4, another one is looked up in Table 5. None: Tables 2
        to 4, as for the baseline.
        """
        if epochs in (None, PRETRAINING_EPOCHS):
            return (self.rows[row], self.table) if row in self.rows else None
        found = self.by_epochs.get(epochs or 0, {})
        return (found[row], 5) if row in found else None


def paper_set(dataset: str) -> PaperSet | None:
    """The paper's set of that name, whatever its punctuation; None if the paper has none."""
    name = "".join(c for c in dataset.lower() if c.isalnum())
    return next((s for s in SETS if name in s.aliases), None)


def paper_reference(dataset: str, structures: int, unit: str, network: str, pooling: str) -> dict[str, float]:
    """The paper's mean test errors by pre-training ("baseline", "forces_1:500:500", ...), in the unit of its Table 1
    (perovskites: eV per cell); {} if the paper has no such dataset (by name, size and unit), network or pooling."""
    found = look_up(dataset, network, pooling)
    if found is None or not same_size(structures, found.dataset) or not same_unit(unit, found.dataset):
        return {}
    return dict(found.rows)


def look_up(dataset: str, network: str, pooling: str) -> PaperReference | None:
    """The same with its table, its unit and the lengths of pre-training of Table 5."""
    found, table = paper_set(dataset), TABLES.get((network.lower(), pooling.lower()))
    if found is None or table is None:
        return None
    by_epochs: dict[int, Mapping[str, float]] = {}
    if table == "2_cgcnn_add":
        by_epochs = {
            int(name.removeprefix("5_cgcnn_epochs")): _column(name, found.column)
            for name in _tables()
            if name.startswith("5_cgcnn_epochs")
        }
    return PaperReference(found, int(table[0]), _column(table, found.column), by_epochs)


def same_unit(unit: str, dataset: PaperSet) -> bool:
    """Whether `unit` is the one of the paper's column; for perovskites, eV is taken as eV per cell."""
    known = UNITS.get("".join(unit.lower().split()))
    return known == dataset.unit or (dataset.unit == "eV/cell" and known == "eV")


def same_size(structures: int, dataset: PaperSet) -> bool:
    """Whether `structures` are the paper's set, give or take one in a hundred that a reader refused."""
    return abs(structures - dataset.structures) <= 0.01 * dataset.structures


def pretraining_row(objective: Mapping[str, Any]) -> str | None:
    """The paper's row for a pre-training objective (the `objective` of a run's config); None if it has none."""
    kind = objective.get("kind", "derivatives")
    if kind != "derivatives":
        return {"derivative_denoising": "denoise_derivative", "head_denoising": "denoise_head"}.get(kind)
    weights = [objective.get(f"{label}_weight") for label in ("energy", "forces", "stress")]
    if any(w is None for w in weights):
        return None
    return "forces_" + ":".join(f"{float(w):g}" for w in weights if w is not None)


@cache
def _tables() -> dict[str, dict[str, dict[str, float]]]:
    """table -> pre-training -> column -> MAE."""
    text = resources.files("dpt_hpc.report").joinpath("paper_tables.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines):
        numbers = {k: float(v) for k, v in row.items() if k not in ("table", "pretraining")}
        tables.setdefault(row["table"], {})[row["pretraining"]] = numbers
    return tables


def _column(table: str, column: str) -> dict[str, float]:
    return {row: numbers[column] for row, numbers in _tables()[table].items()}

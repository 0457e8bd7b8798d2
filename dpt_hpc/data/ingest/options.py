"""What the user may say about a source, and which records are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class IngestOptions:
    """Options of `ingest`; None stands for the format's own convention, which is printed.

    format: see `dpt_hpc.data.ingest.formats.FORMATS`; None detects it. energy_kind: total or per_atom; units and sign:
    the keys of the tables in `units`. *_key: the names of labels in extended XYZ, ASE and JSON files. targets: property
    names and their units, in the order of y where a file has only that. id_key, group_key: record fields that hold the
    structure's id, and the material that a split must not part (None: the reduced formula).

    require: labels and properties that every record must have. min_atoms, max_atoms, max_force (eV/Å, largest
    component), max_stress (GPa, largest component): records beyond are dropped and counted. stride: keep every k-th
    record; limit: stop after so many kept per source. skip_broken: drop and list broken records, not refuse them.
    keep_duplicates: keep records that repeat an earlier one. check: compare units and signs with each other.
    """

    format: str | None = None
    energy_kind: str | None = None
    energy_unit: str | None = None
    forces_unit: str | None = None
    stress_unit: str | None = None
    stress_sign: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    targets: Mapping[str, str] = field(default_factory=dict)
    id_key: str | None = None
    group_key: str | None = None
    require: tuple[str, ...] = ()
    min_atoms: int = 1
    max_atoms: int | None = None
    max_force: float | None = None
    max_stress: float | None = None
    stride: int = 1
    limit: int | None = None
    skip_broken: bool = False
    keep_duplicates: bool = False
    check: bool = True
    shard_atoms: int = 500_000
    dtype: Literal["float32", "float64"] = "float64"
    compression: Literal["gzip", "lzf"] | None = None

    @property
    def label_keys(self) -> dict[str, str]:
        """The keys that were named for labels."""
        named = {"energy": self.energy_key, "forces": self.forces_key, "stress": self.stress_key}
        return {label: key for label, key in named.items() if key is not None}

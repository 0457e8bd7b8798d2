"""Writing a dataset: one shard in memory at a time, a hash for each, the manifest last."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dpt_hpc.data.columns import content_digest, flat_columns
from dpt_hpc.data.manifest import MANIFEST_NAME, SCHEMA_VERSION, UNITS, Manifest, Shard, publish, sha256_of
from dpt_hpc.data.shard_file import write_shard_file
from dpt_hpc.data.statistics import EDGE_CUTOFF, EDGE_FORMULA, EDGE_MAX_NEIGHBORS, Statistics
from dpt_hpc.errors import DataError, EnvironmentFault
from dpt_hpc.structure import Structure

EDGE_ESTIMATE = {"cutoff": EDGE_CUTOFF, "max_neighbors": EDGE_MAX_NEIGHBORS, "formula": EDGE_FORMULA}
CHECK_DISK = "Check its permissions, and the space and quota of its disk."
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
    attributes: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "provenance": provenance}
    attributes |= {f"edge_estimate_{key}": value for key, value in EDGE_ESTIMATE.items()}
    units = {name: UNITS.get(name) or property_units.get(name.removeprefix("properties/")) for name in columns}
    write_shard_file(temporary, columns, attributes, units, options["compression"])
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    digest = sha256_of(temporary)
    size = temporary.stat().st_size
    publish(temporary, final)
    atoms = int(columns["atom_ptr"][-1])
    return Shard(final.name, digest, size, len(block), atoms, content_digest(columns))

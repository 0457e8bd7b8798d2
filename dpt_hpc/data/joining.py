"""What several datasets must agree on, and not share, to be read as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.manifest import Manifest
from dpt_hpc.errors import DataError


def join_units(directories: Sequence[Path], manifests: Sequence[Manifest]) -> dict[str, str]:
    """Units of all properties. Raises DataError if two datasets state one property in different units."""
    units: dict[str, str] = {}
    for directory, manifest in zip(directories, manifests, strict=True):
        for name, unit in manifest.property_units.items():
            if units.setdefault(name, unit) != unit:
                raise DataError(
                    f"dataset {directory}: property {name} is in {unit}, in an earlier dataset in {units[name]}.\n"
                    "Ingest one of them again in the other's unit."
                )
    return units


def refuse_twins(directories: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raises DataError if two directories hold the same data."""
    seen: dict[str, Path] = {}
    for directory, manifest in zip(directories, manifests, strict=True):
        if (earlier := seen.get(manifest.digest)) is not None:
            raise DataError(
                f"dataset {directory}: holds the same data as {earlier} (digest {manifest.digest[:16]}).\n"
                "Every structure would count twice, and stand in training and test part. Name it once."
            )
        seen[manifest.digest] = directory


def refuse_shared_ids(directories: Sequence[Path], sizes: Sequence[int], structure_ids: NDArray[np.str_]) -> None:
    """Raises DataError if a structure_id (S,) stands in two of the directories, which hold `sizes` structures each."""
    names, first, counts = np.unique(structure_ids, return_index=True, return_counts=True)
    if len(names) == len(structure_ids):
        return
    name = names[np.flatnonzero(counts > 1)[np.argmin(first[counts > 1])]]
    places = np.searchsorted(np.cumsum(sizes), np.flatnonzero(structure_ids == name)[:2], side="right")
    one, other = (directories[k] for k in places)
    shared = int((counts > 1).sum())
    raise DataError(
        f"datasets {one} and {other}: both have structure_id {str(name)!r} ({shared} shared in all).\n"
        "A structure must not stand in training and test part. If these are different structures, ingest both sources "
        "into one dataset, which gives them different ids; else name one of the two."
    )

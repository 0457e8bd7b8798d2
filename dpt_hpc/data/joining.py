"""What several datasets must agree on, and not share, to be read as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.manifest import Manifest
from dpt_hpc.errors import DataError

AT_ONCE = 1 << 20
"""Hashes that stand for several ids and are looked into in one reading."""


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


def refuse_shared_ids(
    directories: Sequence[Path], sizes: Sequence[int], ids: Callable[[], Iterable[NDArray[np.bytes_]]]
) -> None:
    """Raises DataError if a structure_id stands in two of the directories, which hold `sizes` structures each.

    ids: reads the ids of all structures, UTF-8, shard by shard; called again where hashes are equal. Takes 16 bytes a
    structure for a moment, however long the ids are.
    """
    hashes = np.sort(np.concatenate([hashed(part) for part in ids()]))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    del hashes
    shared, found = 0, (sum(sizes), 0, b"")
    for start in range(0, len(repeated), AT_ONCE):
        names, places = _named(ids(), repeated[start : start + AT_ONCE])
        unique, member, counts = np.unique(names, return_inverse=True, return_counts=True)
        shared += int((counts > 1).sum())
        for k in np.flatnonzero(counts[member] > 1)[:1].tolist():  # in the order of the datasets
            both = places[member == member[k]]
            found = min(found, (int(both[0]), int(both[1]), bytes(unique[member[k]])))
    if not shared:
        return
    one, other = (directories[k] for k in np.searchsorted(np.cumsum(sizes), found[:2], side="right").tolist())
    raise DataError(
        f"datasets {one} and {other}: both have structure_id {found[2].decode()!r} ({shared} shared in all).\n"
        "A structure must not stand in training and test part. If these are different structures, ingest both sources "
        "into one dataset, which gives them different ids; else name one of the two."
    )


def hashed(ids: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """(S,) 64 bits of each id (S,), the same in whatever width it is kept.

    Eight bytes at a time: multiplied and shifted as in the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    width = -(-ids.dtype.itemsize // 8) * 8
    words = ids.astype(f"S{width}").view("<u8").reshape(len(ids), -1)
    found = np.zeros(len(ids), dtype=np.uint64)
    for word in words.T:
        mixed = (found ^ word) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        found = np.where(word == 0, found, mixed)  # only what fills up the width is zero
    return found


def _named(
    parts: Iterable[NDArray[np.bytes_]], hashes: NDArray[np.uint64]
) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """The ids whose hashes are among `hashes`, which are sorted, and their places among all."""
    names, places = [], []
    first = 0
    for part in parts:
        here = hashed(part)
        near = np.searchsorted(hashes, here)
        chosen = np.flatnonzero(hashes[np.minimum(near, len(hashes) - 1)] == here)
        names.append(part[chosen])
        places.append(chosen + first)
        first += len(part)
    return np.concatenate(names), np.concatenate(places)

"""Splits of a dataset into training, validation and test part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.tables import Indices
from dpt_hpc.errors import DataError


@dataclass(frozen=True)
class Split:
    """Sorted structure indices of the three parts, whose intersections are empty; with `excluded`, which are in none of
    them, their union is what can be learnt from, unless the training part was thinned."""

    train: Indices
    validation: Indices
    test: Indices
    excluded: Indices = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def split_dataset(groups: NDArray[Any], fractions: tuple[float, float, float], seed: int) -> Split:
    """Split by group at random: no group is parted, and the parts come as near to `fractions` as the groups allow.

    groups (S,): one label (name or number) per structure; distinct labels give a plain random split. fractions:
    of training, validation and test, summing to 1. Raises DataError if a part that was asked for would be empty.
    """
    names, member = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    sizes = np.bincount(member, minlength=len(names))
    # A group belongs to the part in which its middle structure falls.
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    bounds = np.cumsum(fractions[:2]) * len(groups)
    part_of_group = np.empty(len(names), dtype=np.int64)
    part_of_group[order] = np.searchsorted(bounds, middle, side="right")
    part = part_of_group[member]
    parts = [np.flatnonzero(part == p) for p in range(3)]
    for name, fraction, indices in zip(("train", "validation", "test"), fractions, parts, strict=True):
        if fraction > 0 and len(indices) == 0:
            raise DataError(
                f"split: the {name} part is empty: {fraction:g} of {len(groups)} structures in {len(names)} groups.\n"
                "Use more structures, a larger fraction, or data.split.by=structure."
            )
    return Split(*parts)


def thin(groups: NDArray[Any], indices: Indices, fraction: float, seed: int) -> Indices:
    """About `fraction` of `indices`, sorted, in whole groups; of the same seed, less lies within more.

    groups (S,): a label of every structure that `indices` count. Raises DataError if nothing is left.
    """
    if fraction == 1:
        return indices
    names, member = np.unique(groups[indices], return_inverse=True)
    order = np.random.default_rng([seed, 1]).permutation(len(names))  # not the draw of the split
    sizes = np.bincount(member, minlength=len(names))
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    taken = np.zeros(len(names), dtype=bool)
    taken[order] = middle <= fraction * len(indices)
    if not taken.any():
        raise DataError(
            f"split: {fraction:g} of the {len(indices)} structures to train, in {len(names)} groups, are none.\n"
            "Set a larger data.split.train_fraction."
        )
    return indices[taken[member]]

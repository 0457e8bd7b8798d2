"""Training, validation and test part of a dataset, checked against what is to be learnt before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.folds import check_order, matbench_fold
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split, split_dataset, thin
from dpt_hpc.data.statistics import EDGE_MAX_NEIGHBORS
from dpt_hpc.data.tables import Indices
from dpt_hpc.errors import DataError, did_you_mean
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.config import (
    DenoisingOptions,
    HeadDenoisingOptions,
    LabelOptions,
    MixedOptions,
    ObjectiveOptions,
    PropertyOptions,
    SplitOptions,
)
from dpt_hpc.train.objective.denoising import at_rest

BLOCK = 512
"""Structures read at a time."""


def make_split(
    dataset: Dataset,
    options: SplitOptions,
    objective: ObjectiveOptions,
    seed: int,
    paths: Sequence[str] = (),
    excluded: Indices | None = None,
) -> Split:
    """The split that `options` describe, of the structures that `objective` can learn from.

    paths: of the dataset's directories, of which an objective of kind mixed may name some. excluded: structures that
    are taken out of the part into which they fall; all others stay where they are without it, so that a run with them
    and one without are tested alike. Raises DataError if a part is empty, or lacks a label of the loss altogether: its
    loss would be 0.
    """
    excluded = np.empty(0, dtype=np.int64) if excluded is None else excluded
    usable = np.arange(len(dataset))
    if isinstance(objective, PropertyOptions):
        usable = np.flatnonzero(~np.isnan(target_values(dataset, objective.target)))
    labels = dataset.group_codes if options.by == "group" else places_as_text(len(dataset))
    drawn = seed if options.seed is None else options.seed
    fractions, test = (options.train, options.validation, options.test), None
    if options.matbench is not None:
        usable, test = _matbench(dataset, options, usable, excluded, seed)
        both = options.train + options.validation
        fractions = (options.train / both, options.validation / both, 0.0)
    split = split_dataset(labels[usable], fractions, drawn)
    train = thin(labels[usable], split.train, options.train_fraction, drawn)
    test = usable[split.test] if test is None else test
    split = _without(Split(usable[train], usable[split.validation], test), excluded)
    if (denoised := denoised_structures(dataset, objective, paths)) is not None:
        if isinstance(objective, MixedOptions) and objective.denoise_max_force is not None:
            denoised |= _at_rest(dataset, objective.denoise_max_force)
        _check_denoised(dataset, objective, denoised, split)
    if isinstance(objective, LabelOptions):
        _check_labels(dataset, objective, split, denoised)
        _check_energy_references(dataset, objective, paths)
    return split


def _without(split: Split, excluded: Indices) -> Split:
    """`split` with no structure of `excluded` in its parts."""
    if len(excluded) == 0:
        return split
    kept = {}
    for part in ("train", "validation", "test"):
        indices = getattr(split, part)
        kept[part] = np.setdiff1d(indices, excluded, assume_unique=True)
        if len(indices) and not len(kept[part]):
            raise DataError(
                f"data.exclude: it names all {len(indices)} structures of the {part} part.\n"
                "Exclude fewer, use another data.split.seed, or add data."
            )
    return Split(**kept, excluded=excluded)


def _matbench(
    dataset: Dataset, options: SplitOptions, usable: Indices, excluded: Indices, fold: int
) -> tuple[Indices, Indices]:
    """What of `usable` is learnt from in an official fold, and its test part, which must be whole."""
    check_order(dataset.ids(np.arange(len(dataset))))
    learnt, test = matbench_fold(str(options.matbench), options.matbench_task, len(dataset), fold)
    if missing := len(np.setdiff1d(test, np.setdiff1d(usable, excluded))):
        raise DataError(
            f"data.split.matbench: {missing} structures of the test part of fold {fold} have no target, or are "
            "excluded.\nAn official fold is tested whole: leave out data.exclude, or ingest the targets."
        )
    return np.intersect1d(learnt, usable), test


def places_as_text(count: int) -> NDArray[np.int64]:
    """(count,) the place of each number from 0 on among the decimal numbers below `count`, sorted as text.

    A split by structure draws from its indices in this order (0, 1, 10, 100, 11, ...), as it always has; made without
    the text, which would take ten times the memory.
    """
    number = np.arange(count)
    digits = np.ones(count, dtype=np.int8)
    for power in range(1, len(str(count))):
        digits[10**power :] += 1
    widened = number * 10 ** (len(str(count)) - digits.astype(np.int64))
    places = np.empty(count, dtype=np.int64)
    places[np.lexsort((digits, widened))] = number
    return places


def target_values(dataset: Dataset, target: str) -> NDArray[np.float64]:
    """(S,) values of the property to learn, NaN where missing. Raises DataError if the dataset does not have it."""
    if target not in dataset.property_names:
        raise DataError(
            f"objective.target is {target!r}, but the dataset has "
            f"{', '.join(dataset.property_names) or 'no properties'}.\nSet objective.target to one of them."
            + did_you_mean(target, dataset.property_names)
        )
    return dataset.property_values(target)


def check_elements(dataset: Dataset, num_elements: int) -> None:
    """Refuse elements beyond the network's encoding."""
    beyond = [SYMBOLS[z] for z in dataset.elements if z > num_elements]
    if beyond:
        raise DataError(
            f"model.num_elements is {num_elements}, but the dataset contains {', '.join(beyond)}.\n"
            "Raise model.num_elements, or leave those structures out."
        )


def denoised_ranges(dataset: Dataset, objective: ObjectiveOptions, paths: Sequence[str]) -> tuple[range, ...]:
    """The stretches of indices of those datasets, of `paths`, that `objective` denoises as a whole.

    Raises DataError as `denoised_datasets` does.
    """
    first = np.cumsum([0, *(manifest.num_structures for manifest in dataset.manifests)]).tolist()
    return tuple(range(first[k], first[k + 1]) for k in denoised_datasets(objective, paths))


def denoised_datasets(objective: ObjectiveOptions, paths: Sequence[str]) -> list[int]:
    """The places among `paths` of the datasets that `objective` denoises as a whole.

    Raises DataError for a name that none of them has, or several.
    """
    if not isinstance(objective, MixedOptions):
        return []
    names = [Path(path).name for path in paths]
    for name in objective.denoise_datasets:
        if name not in names:
            raise DataError(
                f"objective.denoise_datasets names {name!r}, but data.path has {', '.join(names)}.\n"
                "Name the last part of one of these paths, or add the dataset to data.path."
            )
        if names.count(name) > 1:
            meant = [path for path, other in zip(paths, names, strict=True) if other == name]
            raise DataError(
                f"objective.denoise_datasets names {name!r}, but data.path has it {len(meant)} times: "
                f"{', '.join(meant)}.\n"
                "It does not say which of them is to be denoised: give their directories different names."
            )
    return [k for k, name in enumerate(names) if name in objective.denoise_datasets]


def denoised_structures(
    dataset: Dataset, objective: ObjectiveOptions, paths: Sequence[str]
) -> NDArray[np.bool_] | None:
    """(S,) bool: to which structures `objective` adds noise, whatever their forces; None if it is of a kind that does
    not.

    Raises DataError as `denoised_ranges` does.
    """
    if isinstance(objective, (DenoisingOptions, HeadDenoisingOptions)):
        return np.ones(len(dataset), dtype=bool)
    if not isinstance(objective, MixedOptions):
        return None
    denoised = ~(dataset.has_energy | dataset.has_forces | dataset.has_stress)
    for stretch in denoised_ranges(dataset, objective, paths):
        denoised[stretch.start : stretch.stop] = True
    return denoised


def count_single_atoms(dataset: Dataset, objective: ObjectiveOptions, paths: Sequence[str], split: Split) -> int:
    """How many structures of the parts of `split` `objective` denoises, but cannot learn from: those of one atom."""
    denoised = denoised_structures(dataset, objective, paths)
    if denoised is None:
        return 0
    alone = denoised & (dataset.num_atoms == 1)
    return sum(int(alone[indices].sum()) for indices in (split.train, split.validation, split.test))


def _at_rest(dataset: Dataset, max_force: float) -> NDArray[np.bool_]:
    """(S,) bool: the structures that `at_rest` finds. Reads them all, a block at a time."""
    blocks = [
        at_rest(dataset.read(np.arange(start, min(start + BLOCK, len(dataset)))), max_force).numpy()
        for start in range(0, len(dataset), BLOCK)
    ]
    return np.concatenate(blocks)


def _check_labels(dataset: Dataset, objective: LabelOptions, split: Split, denoised: NDArray[np.bool_] | None) -> None:
    present = {"energy": dataset.has_energy, "forces": dataset.has_forces, "stress": dataset.has_stress}
    if denoised is not None:
        present = {label: has & ~denoised for label, has in present.items()}
    _check_volumes(dataset, present["stress"], split)
    for label, has in present.items():
        weight: Any = getattr(objective, f"{label}_weight")
        if weight == 0:
            continue
        if not has.any():
            raise DataError(
                f"objective.{label}_weight is {weight:g}, but no structure of the dataset has {label}.\n"
                f"Set objective.{label}_weight=0, or ingest the data with its {label}."
            )
        for part in ("train", "validation", "test"):
            indices = getattr(split, part)
            if len(indices) and not has[indices].any():
                raise DataError(
                    f"objective.{label}_weight is {weight:g}, but no structure of the {part} part has {label} "
                    f"({int(has.sum())} of {len(dataset)} in the dataset have).\n"
                    f"Set objective.{label}_weight=0, another data.split.seed, or add data with {label}."
                )


def _check_energy_references(dataset: Dataset, objective: LabelOptions, paths: Sequence[str]) -> None:
    """Refuse to learn energies of unlike zeros together: no network can, and a catalog entry says which zero is its."""
    if objective.energy_weight == 0:
        return
    denoised = denoised_datasets(objective, paths) if isinstance(objective, MixedOptions) else []
    first: dict[str, str] = {}
    for place, (path, manifest) in enumerate(zip(paths, dataset.manifests, strict=False)):
        if place not in denoised and len(paths) > 1 and (reference := _energy_reference(manifest.provenance)):
            first.setdefault(reference, path)
    if len(first) > 1:
        (one, here), (other, there) = list(first.items())[:2]
        raise DataError(
            f"data.path: the energies of {here} are {one}, those of {there} {other}: they differ by a number for every "
            "element, which the network would have to learn as physics.\n"
            "Set objective.energy_weight=0, denoise one of them (objective.kind=mixed, denoise_datasets), or name one."
        )


def _energy_reference(provenance: Mapping[str, Any]) -> str | None:
    """As dataset.json states it, or, where an early version wrote that, the catalog's entry."""
    if "energy_reference" in provenance or "catalog" not in provenance:
        return provenance.get("energy_reference")
    from dpt_hpc.data.catalog.entries import Catalog  # late: it brings the readers of all formats

    return next((entry.energy_reference for entry in Catalog.read() if entry.name == provenance["catalog"]), None)


def _check_denoised(dataset: Dataset, objective: ObjectiveOptions, denoised: NDArray[np.bool_], split: Split) -> None:
    for part in ("train", "validation", "test"):
        indices = getattr(split, part)
        found = indices[denoised[indices]]
        if len(indices) and not len(found):
            raise DataError(
                f"objective.kind is mixed, but no structure of the {part} part is denoised: {int(denoised.sum())} of "
                f"{len(denoised)} have no energy, forces and stress, are of objective.denoise_datasets, or have no "
                "force above objective.denoise_max_force.\n"
                "Set objective.denoise_max_force, as to 0.01, name datasets to denoise, or use another data.split.seed."
            )
        if len(indices) and dataset.num_atoms[found].max() == 1:
            raise DataError(
                f"objective.kind is {objective.kind}, but all structures of the {part} part that are denoised have one "
                "atom.\nIt moves with all its images, so that its noise cannot be learnt: add larger structures."
            )


def _check_volumes(dataset: Dataset, has_stress: NDArray[np.bool_], split: Split) -> None:
    """Refuse stress of what has no volume: validation reports it, whatever its weight."""
    parts = np.concatenate([split.train, split.validation, split.test])
    # Without a volume every atom has as many neighbours as are ever counted: the cells of few others are read.
    suspect = parts[has_stress[parts] & (dataset.edge_estimate[parts] >= dataset.num_atoms[parts] * EDGE_MAX_NEIGHBORS)]
    suspect = np.sort(suspect)
    flat = suspect[dataset.volumes(suspect) == 0]
    if len(flat):
        shown = ", ".join(dataset.ids(flat[:3])) + (", ..." if len(flat) > 3 else "")
        raise DataError(
            f"{len(flat)} structures have stress, but a cell of zero volume: {shown}.\n"
            "Stress is per volume. Give them a cell, ingest them without stress, or name them in data.exclude."
        )

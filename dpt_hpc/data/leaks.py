"""Structures of a downstream dataset that a pre-training dataset holds too, and how a run leaves them out.

First by reduced composition, in one pass over both datasets, then those of like composition pair by pair by geometry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.tables import Indices
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.plain_text import from_json

By = Literal["structure", "composition"]
Progress = Callable[[int, int], None]
MAX_Z = 1 << 8


@dataclass(frozen=True)
class Match:
    """A downstream structure, and the ids under which the pre-training dataset holds it."""

    structure_id: str
    found_as: tuple[str, ...]


@dataclass(frozen=True)
class Leaks:
    """What was found of one downstream dataset. checked: structures looked at; same_composition: of these, those whose
    reduced composition the pre-training dataset has; matches: those that were found."""

    dataset: str
    digest: str
    part: str
    structures: int
    checked: int
    same_composition: int
    matches: tuple[Match, ...]

    def line(self) -> str:
        """For the terminal."""
        share = 100 * len(self.matches) / max(self.checked, 1)
        return (
            f"{self.dataset} ({self.part}): {len(self.matches):,} of {self.checked:,} structures ({share:.2g} %) are "
            f"in the pre-training dataset; {self.same_composition:,} have a composition that it has"
        )


def compositions(dataset: Dataset) -> Iterator[bytes]:
    """The reduced composition of each structure, in order: elements and counts by their greatest common divisor."""
    for shard, (start, stop) in enumerate(zip(dataset.first_structure[:-1], dataset.first_structure[1:], strict=True)):
        numbers = dataset.files.read(shard, "atomic_numbers")
        if numbers is None or start == stop:
            continue
        atoms = np.diff(dataset.atom_ptr[start : stop + 1])
        owner = np.repeat(np.arange(stop - start), atoms)
        kinds, counts = np.unique(owner * MAX_Z + np.asarray(numbers, dtype=np.int64), return_counts=True)
        first = np.searchsorted(kinds, np.arange(stop - start) * MAX_Z)
        reduced = counts // np.repeat(np.gcd.reduceat(counts, first), np.diff([*first, len(kinds)]))
        table = np.stack([kinds % MAX_Z, reduced], axis=1)
        for begin, end in zip(first.tolist(), [*first[1:].tolist(), len(kinds)], strict=True):
            yield table[begin:end].tobytes()


def find_leaks(
    pretraining: Dataset,
    downstream: Dataset,
    indices: Indices | None = None,
    *,
    by: By = "structure",
    names: tuple[str, str] = ("", "all"),
    progress: Progress | None = None,
) -> Leaks:
    """Structures `indices` (B,) of `downstream` (None: all) that `pretraining` holds too.

    by: structure compares those of like composition with pymatgen's StructureMatcher; composition takes that alone.
    names: of the downstream dataset and of its part. progress: called with the pairs compared so far and those in all.
    """
    chosen = np.arange(len(downstream)) if indices is None else np.asarray(indices, dtype=np.int64)
    kinds = list(compositions(downstream))
    wanted = {kinds[i] for i in chosen.tolist()}
    held = defaultdict(list)
    for index, kind in enumerate(compositions(pretraining)):
        if kind in wanted:
            held[kind].append(index)
    suspects = [i for i in chosen.tolist() if kinds[i] in held]
    pairs = sum(len(held[kinds[i]]) for i in suspects)
    found = {i: held[kinds[i]] for i in suspects}
    if by == "structure" and suspects:
        found = _same(pretraining, downstream, found, pairs, progress)
    matches = [
        Match(structure_id, tuple(pretraining.ids(found[i])))
        for i, structure_id in zip(suspects, downstream.ids(suspects), strict=True)
        if found[i]
    ]
    digest = "+".join(manifest.digest for manifest in downstream.manifests)
    return Leaks(names[0], digest, names[1], len(downstream), len(chosen), len(suspects), tuple(matches))


def _same(
    pretraining: Dataset, downstream: Dataset, held: dict[int, list[int]], pairs: int, progress: Progress | None
) -> dict[int, list[int]]:
    from dpt_hpc.data.ingest.matching import Matcher

    matcher, done = Matcher(), 0
    found = {}
    for index, candidates in held.items():
        structure = downstream.get(index)
        found[index] = [j for j in candidates if matcher.same(structure, pretraining.get(j))]
        done += len(candidates)
        if progress is not None:
            progress(done, pairs)
    return found


@dataclass(frozen=True)
class Exclusion:
    """What to leave out of a pre-training, as sorted indices: structures that were found, and others of their materials
    (of the same group, where a group is not merely a formula). by_formula: those found whose group is their formula,
    and so names no material; of_formula: the others of these groups, which stay."""

    matched: Indices
    same_material: Indices
    by_formula: Indices
    of_formula: Indices

    def lines(self, structures: int, place: Path | None, option: str) -> list[str]:
        """For the terminal. structures: of the dataset; place: of the file for data.exclude, if one is written."""
        more = f", {len(self.same_material):,} more of the same materials" if len(self.same_material) else ""
        count = len(self.matched) + len(self.same_material)
        lines = [
            f"to leave out of the pre-training: {count:,} of {structures:,} structures: {len(self.matched):,} that "
            f"were found{more}" + (f", in {place} (--set data.exclude={place})" if place else "")
        ]
        if len(self.of_formula):
            lines.append(
                f"  the group of {len(self.by_formula):,} of them is their formula, which names no material: "
                f"{len(self.of_formula):,} other structures of these formulas stay ({option} leaves them out)"
            )
        return lines


def to_exclude(pretraining: Dataset, found: Sequence[Leaks], *, whole_materials: bool = True) -> Exclusion:
    """What `found` says to leave out of `pretraining`.

    A frame of a material that a test holds gives it away, too, even where it is strained so far that it does not match.
    whole_materials: False leaves such frames in.
    """
    from dpt_hpc.data.ingest.pipeline import reduced_formula

    ids = {name for leaks in found for match in leaks.matches for name in match.found_as}
    matched = np.flatnonzero(np.isin(pretraining.structure_ids, sorted(ids))) if ids else np.empty(0, dtype=np.int64)
    groups = pretraining.groups
    formulas = [reduced_formula(pretraining.get(i).atomic_numbers.numpy()) for i in matched.tolist()]
    named = groups[matched] != np.array(formulas, dtype=np.str_)
    others = np.setdiff1d(np.arange(len(pretraining)), matched, assume_unique=True)
    same, alike = (others[np.isin(groups[others], groups[matched[chosen]])] for chosen in (named, ~named))
    return Exclusion(matched, same if whole_materials else same[:0], matched[~named], alike)


def leaks_as_json(
    pretraining: Dataset, name: str, by: By, found: Sequence[Leaks], exclusion: Exclusion
) -> dict[str, Any]:
    """What was found; `exclude`: the ids to leave out of a pre-training. name: of the pre-training dataset."""
    content: dict[str, Any] = {
        "pretraining": {
            "dataset": name,
            "digest": "+".join(manifest.digest for manifest in pretraining.manifests),
            "structures": len(pretraining),
        },
        "by": by,
        "downstream": [asdict(leaks) for leaks in found],
        "excluded": {
            "found": len(exclusion.matched),
            "same_material": len(exclusion.same_material),
            "found_in_groups_by_formula": len(exclusion.by_formula),
            "others_of_these_formulas": len(exclusion.of_formula),
        },
        "exclude": sorted(pretraining.ids(np.concatenate([exclusion.matched, exclusion.same_material]))),
    }
    if by == "structure":
        from dpt_hpc.data.ingest.matching import CONVENTION

        content["tolerances"] = CONVENTION
    return content


def part_tested_by(run: Path, downstream: Dataset) -> Indices:
    """Indices in `downstream` of the test structures of a fine-tuning, or of one of its seeds (all seeds: of any).

    Raises DataError if `run` has no split, or one of another dataset.
    """
    files = [run / "split.npz"] if (run / "split.npz").exists() else sorted(run.glob("seed_*/split.npz"))
    if not files:
        raise DataError(
            f"run {run}: has no split.npz, so its test part is not known.\nName a run directory, or a seed's."
        )
    wanted: set[str] = set()
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as parts:
                wanted.update(map(str, parts["test"].tolist()))
        except Exception as error:  # numpy and zipfile raise nearly anything for a damaged file
            raise DataError(f"{file}: cannot be read: {error}.\nRestore the file, or name another run.") from None
    place = {name: i for i, name in enumerate(downstream.structure_ids.tolist())}
    if missing := wanted - place.keys():
        raise DataError(
            f"run {run}: {len(missing)} of its {len(wanted)} test structures, such as {min(missing)}, are not in the "
            "dataset.\nName the dataset that the run was trained on."
        )
    return np.sort(np.array([place[name] for name in wanted], dtype=np.int64))


def read_exclusion(paths: Sequence[str], dataset: Dataset) -> Indices:
    """Sorted indices of the structures that data.exclude names: files of `dpt-hpc data leaks --out`, or JSON lists.

    Raises ConfigError for a file that is not there or not of this form, DataError for ids that the dataset has not got.
    """
    place = {name: i for i, name in enumerate(dataset.structure_ids.tolist())}
    return np.array(sorted({place[name] for path in paths for name in _excluded_by(path, place)}), dtype=np.int64)


def _excluded_by(path: str, known: Container[str]) -> list[str]:
    try:
        content = from_json(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"data.exclude {path}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"data.exclude {path}: not JSON: {error}.\n{_FORM}") from None
    ids = content.get("exclude") if isinstance(content, dict) else content
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ConfigError(f"data.exclude {path}: has no list of structure ids.\n{_FORM}")
    if unknown := sorted(name for name in set(ids) if name not in known):
        shown = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        raise DataError(
            f"data.exclude {path}: {len(unknown)} of its {len(set(ids))} ids are not in the dataset: {shown}.\n"
            "It would leave in what it should leave out. Make it with `dpt-hpc data leaks` on the dataset of data.path."
        )
    return ids


_FORM = "Make it with `dpt-hpc data leaks PRETRAINING DOWNSTREAM... --out FILE`."

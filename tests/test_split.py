"""Splits: no group in two parts, nothing lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import split_dataset
from dpt_hpc.errors import DataError
from dpt_hpc.train.config import DerivativesOptions, ObjectiveOptions, PropertyOptions, SplitOptions
from dpt_hpc.train.parts import make_split, places_as_text


@given(st.lists(st.integers(0, 12), min_size=30, max_size=200), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_split_parts_no_group_and_loses_nothing(labels: list[int], seed: int) -> None:
    groups = np.array([f"material {label}" for label in labels])
    try:
        split = split_dataset(groups, (0.6, 0.2, 0.2), seed)
    except DataError:
        return  # too few groups for three parts
    parts = [split.train, split.validation, split.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    members = [set(groups[p]) for p in parts]
    assert members[0].isdisjoint(members[1] | members[2])
    assert members[1].isdisjoint(members[2])


def test_a_random_split_has_the_sizes_asked_for() -> None:
    split = split_dataset(np.arange(1000).astype(str), (0.6, 0.2, 0.2), seed=3)
    assert [len(split.train), len(split.validation), len(split.test)] == [600, 200, 200]


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(DataError, match=r"split: the validation part is empty: 0\.2 of 3 structures in 1 groups"):
        split_dataset(np.array(["NaCl"] * 3), (0.6, 0.2, 0.2), seed=0)


@pytest.mark.parametrize("count", [1, 9, 10, 11, 100, 101, 1234])
def test_a_split_by_structure_draws_from_the_indices_sorted_as_text(count: int) -> None:
    _, places = np.unique(np.arange(count).astype(str), return_inverse=True)
    assert places_as_text(count).tolist() == places.tolist()


@pytest.mark.parametrize("objective", [DerivativesOptions(), PropertyOptions(target="volume_per_atom")])
@pytest.mark.parametrize("by", ["structure", "group"])
def test_what_is_excluded_leaves_the_others_in_their_parts(
    small_dataset: Path, by: str, objective: ObjectiveOptions
) -> None:
    dataset = Dataset.open(small_dataset)
    options = SplitOptions.model_validate(
        {"train": 0.5, "validation": 0.25, "test": 0.25, "by": by, "train_fraction": 0.7}
    )
    whole = make_split(dataset, options, objective, 3)
    left_out = np.sort(np.array([whole.train[2], whole.validation[0], whole.test[1]]))
    split = make_split(dataset, options, objective, 3, excluded=left_out)
    assert split.excluded.tolist() == left_out.tolist()
    for part in ("train", "validation", "test"):
        before, after = (getattr(one, part).tolist() for one in (whole, split))
        assert after == [index for index in before if index not in left_out]
        assert len(after) == len(before) - 1
    with pytest.raises(DataError, match=r"data\.exclude: it names all \d+ structures of the test part\.\nExclude"):
        make_split(dataset, options, objective, 3, excluded=whole.test)

"""Splits and batches: nothing lost, nothing twice, whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt_hpc.data.sampler import Sampler, balance
from dpt_hpc.data.split import split_dataset
from dpt_hpc.errors import DataError

EDGES = np.random.default_rng(0).integers(1, 10_000, size=203)


@given(parts=st.integers(1, 9), batch_size=st.integers(1, 60), epoch=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_an_epoch_is_the_dataset_each_structure_once(parts: int, batch_size: int, epoch: int) -> None:
    indices = np.arange(3, 200)
    sampler = Sampler(indices, EDGES, batch_size, seed=1)
    steps = [sampler.step(epoch, k, parts) for k in range(sampler.steps_per_epoch)]
    assert sorted(np.concatenate([p for step in steps for p in step]).tolist()) == indices.tolist()
    assert all(len(step) == parts for step in steps)


def test_the_structures_of_a_step_do_not_depend_on_the_ranks() -> None:
    sampler = Sampler(np.arange(200), EDGES, 32, seed=1)
    for parts in (2, 3, 8):
        for k in range(sampler.steps_per_epoch):
            assert sorted(np.concatenate(sampler.step(4, k, parts))) == sorted(sampler.step(4, k, 1)[0])


def test_epochs_and_seeds_differ_and_repeat() -> None:
    a = Sampler(np.arange(200), EDGES, 200, seed=1)
    b = Sampler(np.arange(200), EDGES, 200, seed=2)
    assert np.array_equal(a.step(1, 0, 1)[0], a.step(1, 0, 1)[0])
    assert not np.array_equal(a.step(1, 0, 1)[0], a.step(2, 0, 1)[0])
    assert not np.array_equal(a.step(1, 0, 1)[0], b.step(1, 0, 1)[0])


def test_parts_are_balanced_by_edges() -> None:
    indices = np.arange(200)
    loads = [EDGES[p].sum() for p in balance(indices, EDGES, 4)]
    assert max(loads) / np.mean(loads) < 1.01
    plain = [EDGES[p].sum() for p in np.array_split(indices, 4)]
    assert max(plain) / np.mean(plain) > max(loads) / np.mean(loads)


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

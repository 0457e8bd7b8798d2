"""Batches: every structure once an epoch, steps that do not depend on the ranks, equal work, windows, budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt_hpc.data.sampler import BLOCK, Sampler
from dpt_hpc.data.tables import Indices

EDGES = np.random.default_rng(0).integers(1, 10_000, size=1000)
INDICES = np.flatnonzero(np.random.default_rng(1).random(1000) < 0.7)
"""A training part: ascending, with gaps."""

samplers = st.builds(
    lambda size, batch_size, seed, window, similar, budget: Sampler(
        INDICES[:size], EDGES, batch_size, seed, window=window, similar_sizes=similar, edge_budget=budget
    ),
    size=st.integers(1, len(INDICES)),
    batch_size=st.integers(1, 90),
    seed=st.integers(0, 3),
    window=st.one_of(st.integers(1, 800), st.just(65_536)),
    similar=st.booleans(),
    budget=st.one_of(st.none(), st.integers(1, 60_000)),
)


def flat(parts: Sequence[Sequence[Indices]]) -> list[int]:
    return [int(i) for micro in parts for part in micro for i in part]


@given(sampler=samplers, world_size=st.integers(1, 40), accumulation=st.integers(1, 3), epoch=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_the_dataset_each_structure_once(
    sampler: Sampler, world_size: int, accumulation: int, epoch: int
) -> None:
    seen: list[int] = []
    for k in range(sampler.steps_per_epoch):
        parts = sampler.parts(epoch, k, world_size, accumulation)
        assert len(parts) >= accumulation
        assert all(len(micro) == world_size for micro in parts)
        assert sorted(flat(parts)) == sorted(sampler.step(epoch, k).tolist())
        assert 1 <= len(flat(parts)) <= sampler.batch_size
        seen += flat(parts)
    assert sorted(seen) == sampler.indices.tolist()


@given(sampler=samplers, world_size=st.integers(1, 40), accumulation=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_a_part_keeps_the_budget_or_is_one_structure(sampler: Sampler, world_size: int, accumulation: int) -> None:
    budget = sampler.edge_budget
    for k in range(sampler.steps_per_epoch):
        parts = sampler.parts(1, k, world_size, accumulation)
        if budget is None:
            assert len(parts) == accumulation
        else:
            assert all(EDGES[part].sum() <= budget or len(part) == 1 for micro in parts for part in micro)
            # No micro-batch that nobody needs.
            assert len(parts) == accumulation or any(len(part) for part in parts[-1])
    assert sampler.above_budget().tolist() == [i for i in sampler.indices if EDGES[i] > (budget or np.inf)]


@pytest.mark.parametrize("similar", [False, True])
def test_the_structures_of_a_step_do_not_depend_on_ranks_or_budget(similar: bool) -> None:
    free = Sampler(INDICES, EDGES, 32, seed=1, window=200, similar_sizes=similar)
    tight = Sampler(INDICES, EDGES, 32, seed=1, window=200, similar_sizes=similar, edge_budget=9_000)
    for k in range(free.steps_per_epoch):
        for world_size in (1, 2, 3, 8):
            for sampler in (free, tight):
                assert sorted(flat(sampler.parts(4, k, world_size, 2))) == sorted(free.step(4, k))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    for options in ({}, {"window": 100}, {"similar_sizes": True}):
        a = Sampler(INDICES, EDGES, 50, seed=1, **options)
        b = Sampler(INDICES, EDGES, 50, seed=2, **options)
        first = a.step(1, 3)
        assert set(a.step(2, 3)) != set(first) != set(b.step(1, 3))
        assert np.array_equal(a.step(1, 3), first)


def test_a_dataset_of_one_window_is_one_permutation() -> None:
    sampler = Sampler(INDICES, EDGES, 64, seed=5, window=len(INDICES))
    drawn = np.concatenate([sampler.step(3, k) for k in range(sampler.steps_per_epoch)])
    assert np.array_equal(drawn, np.random.default_rng([5, 3]).permutation(INDICES))
    assert sampler.windows() == [range(sampler.steps_per_epoch)]


def test_a_larger_dataset_is_drawn_window_by_window_from_blocks_of_neighbours() -> None:
    indices = np.arange(64 * 200 + 17)
    sampler = Sampler(indices, indices, 50, seed=5, window=1_030)
    windows = sampler.windows()
    assert [k for w in windows for k in w] == list(range(sampler.steps_per_epoch))
    assert {len(w) for w in windows[:-1]} == {20}  # whole steps: 1,000 structures
    for epoch in (1, 2):
        members = [np.concatenate([sampler.step(epoch, k) for k in w]) for w in windows]
        assert [len(m) for m in members] == [1000] * 12 + [817]
        for m in members:
            assert len(np.unique(m // BLOCK)) <= 1000 / BLOCK + 3
            # Shuffled: hardly a structure is followed by its neighbour.
            assert np.mean(np.diff(m) == 1) < 0.02
    # Other blocks come together in another epoch.
    first = [set(np.concatenate([sampler.step(epoch, k) for k in windows[0]])) for epoch in (1, 2)]
    assert len(first[0] & first[1]) < 300


def test_a_window_smaller_than_a_step_is_one_step() -> None:
    assert [len(w) for w in Sampler(INDICES, EDGES, 300, seed=0, window=10).windows()] == [1, 1, 1]


def test_ranks_get_equal_numbers_of_edges() -> None:
    sampler = Sampler(INDICES, EDGES, 50, seed=0)
    for ranks in (4, 16):
        balanced = [sampler.imbalance(sampler.parts(1, k, ranks, 1)) for k in range(sampler.steps_per_epoch - 1)]
        plain = [
            sampler.imbalance([np.array_split(sampler.step(1, k), ranks)]) for k in range(sampler.steps_per_epoch - 1)
        ]
        assert np.mean(balanced) < {4: 1.01, 16: 1.13}[ranks]
        assert np.mean(balanced) - 1 < (np.mean(plain) - 1) / 3


def test_a_thousand_ranks_get_equal_numbers_of_edges() -> None:
    sizes = np.random.default_rng(2).lognormal(7, 0.9, size=26_000).clip(8, 15_500).astype(np.int64)
    sampler = Sampler(np.arange(len(sizes)), sizes, 1024 * 12, seed=0)
    assert max(sampler.imbalance(sampler.parts(1, k, 1024, 1)) for k in range(2)) < 1.05


def test_accumulated_micro_batches_have_equal_numbers_of_edges() -> None:
    parts = Sampler(INDICES, EDGES, 120, seed=0).parts(1, 0, 2, 3)
    loads = np.array([[EDGES[part].sum() for part in micro] for micro in parts])
    assert loads.shape == (3, 2)
    assert loads.max() / loads.mean() < 1.02


def test_imbalance_is_the_fullest_rank_over_the_mean() -> None:
    edges = np.array([10, 30, 20, 0])
    sampler = Sampler(np.arange(4), edges, 4, seed=0)
    whole = [np.array([0]), np.array([1]), np.array([2])]
    assert sampler.imbalance([whole]) == pytest.approx(30 / 20)
    assert sampler.imbalance([whole, [np.array([2]), np.array([], dtype=int), np.array([0])]]) == pytest.approx(1.0)
    assert sampler.imbalance([[np.array([3]), np.array([3])]]) == 0.0


def test_similar_sizes_balance_one_structure_per_rank() -> None:
    """Where random steps leave nothing to balance with; and still no two epochs have the same steps."""

    def mean(sampler: Sampler) -> float:
        steps = range(sampler.steps_per_epoch)
        return float(np.mean([sampler.imbalance(sampler.parts(1, k, 4, 1)) for k in steps]))

    indices = INDICES[:600]
    similar = Sampler(indices, EDGES, 4, seed=0, similar_sizes=True)
    assert mean(similar) < 1.05
    assert mean(Sampler(indices, EDGES, 4, seed=0)) > 1.3
    steps = [{frozenset(similar.step(epoch, k)) for k in range(similar.steps_per_epoch)} for epoch in (1, 2)]
    assert len(steps[0] & steps[1]) < len(steps[0]) / 4
    sizes = [EDGES[similar.step(1, k)].mean() for k in range(similar.steps_per_epoch)]
    assert abs(np.corrcoef(sizes, np.arange(len(sizes)))[0, 1]) < 0.2  # not from small to large


def test_the_short_step_of_similar_sizes_is_not_always_that_of_the_largest() -> None:
    sampler = Sampler(INDICES[:201], EDGES, 50, seed=0, similar_sizes=True)
    mean = [
        EDGES[step].mean()
        for epoch in range(1, 40)
        for step in (sampler.step(epoch, k) for k in range(sampler.steps_per_epoch))
        if len(step) == 1
    ]
    assert len(mean) == 39
    assert min(mean) < 2_500
    assert max(mean) > 7_500


def test_a_structure_above_the_budget_is_alone() -> None:
    edges = np.array([100, 5, 5, 5, 5, 5])
    sampler = Sampler(np.arange(6), edges, 6, seed=0, edge_budget=20)
    parts = [sorted(part.tolist()) for (part,) in sampler.parts(1, 0, 1, 1)]
    assert parts[0] == [0]
    assert len(parts) == 3
    assert sampler.above_budget().tolist() == [0]


def seconds_of(work: Callable[[], object]) -> float:
    """Processor time of this thread, the least of a few."""
    taken = []
    for _ in range(5):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return min(taken)


def test_sixteen_thousand_ranks_divide_a_step_in_milliseconds_and_agree() -> None:
    sizes = np.random.default_rng(2).lognormal(7, 0.9, size=200_000).clip(8, 15_500).astype(np.int64)
    one, other = (Sampler(np.arange(len(sizes)), sizes, len(sizes), seed=0) for _ in range(2))
    parts = one.parts(1, 0, 16_000, 1)
    assert one.imbalance(parts) < 1.01
    other.parts(2, 0, 7, 1)
    again = other.parts(1, 0, 16_000, 1)
    np.testing.assert_array_equal(parts.structures, again.structures)
    np.testing.assert_array_equal(parts.sizes, again.sizes)
    assert seconds_of(lambda: one.parts(1, 0, 16_000, 1)) < 0.05  # with a sort of places at each turn: 0.1


def test_many_structures_that_go_alone_are_not_searched_for_one_by_one() -> None:
    edges = np.full(512, 501)
    sampler = Sampler(np.arange(512), edges, 512, seed=0, edge_budget=1000)
    assert len(sampler.parts(1, 0, 1, 1)) == 512
    assert seconds_of(lambda: sampler.parts(1, 0, 1, 1)) < 0.2


def test_parts_are_sequences() -> None:
    parts = Sampler(INDICES, EDGES, 120, seed=0).parts(1, 0, 3, 2)
    assert [len(parts), len(parts[0]), len(parts[-1])] == [2, 3, 3]
    np.testing.assert_array_equal(parts[1][2], parts[-1][-1])
    np.testing.assert_array_equal(np.concatenate([p for micro in parts for p in micro]), parts.structures)
    with pytest.raises(IndexError):
        parts[0][3]

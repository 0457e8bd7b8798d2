"""The prediction's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from dpt_hpc.scaling.predict import Conditions, Network, Work, all_reduce, predict_curve, predict_step, verdicts

NETWORK = Network(latency=1e-6, bandwidth=1e9)
WORK = Work(fixed=0.01, per_edge=1e-6, edges=1000.0, gradient_bytes=4e6, messages=1, sums=2)
WEAK = Conditions("weak", structures=90)
"""One rank: 0.01 s + 90 x 1000 x 1 µs = 0.1 s."""


def even(_: int) -> float:
    return 1.0


def test_one_rank_alone_sends_nothing_and_loses_nothing() -> None:
    point = predict_step(WORK, NETWORK, WEAK, 1, 1.0)
    assert point.seconds == pytest.approx(0.1)
    assert point.efficiency == pytest.approx(1.0)
    assert point.structures_per_second == pytest.approx(900)
    assert (point.algorithm, point.bent_by) == ("none", None)


def test_all_reduce_by_ring_and_by_tree() -> None:
    # 4 ranks, 4 MB: ring 6 µs + 1.5 x 4 ms; tree 4 µs + 2 x 4 ms.
    assert all_reduce(4e6, 1, 4, NETWORK) == ("ring", pytest.approx(6e-6), pytest.approx(6e-3))
    # 4 ranks, 8 bytes: ring 6 µs + 12 ns; tree 4 µs + 16 ns.
    assert all_reduce(8, 1, 4, NETWORK) == ("tree", pytest.approx(4e-6), pytest.approx(16e-9))
    # 1,000 ranks, 4 MB in 3 pieces: ring 5,994 µs + 7.992 ms; tree 3 x 20 µs + 8 ms.
    assert all_reduce(4e6, 3, 1000, NETWORK) == ("tree", pytest.approx(60e-6), pytest.approx(8e-3))
    assert all_reduce(4e6, 1, 1, NETWORK) == ("none", 0.0, 0.0)


def test_weak_scaling_on_four_ranks() -> None:
    # 0.01 + 0.09 + 0.09 x 0.1 + ring 6 ms + (6 + 2 sums x 4) µs = 115.014 ms
    point = predict_step(WORK, NETWORK, WEAK, 4, 1.1)
    assert point.terms == {
        "work": pytest.approx(0.09),
        "fixed": pytest.approx(0.01),
        "imbalance": pytest.approx(0.009),
        "jitter": 0.0,
        "bandwidth": pytest.approx(0.006),
        "latency": pytest.approx(14e-6),
        "division": 0.0,
        "data": 0.0,
        "checkpoint": 0.0,
    }
    assert point.seconds == pytest.approx(0.115014)
    assert point.efficiency == pytest.approx(0.1 / 0.115014)
    assert point.structures_per_second == pytest.approx(4 * 90 / 0.115014)
    assert point.bent_by == "imbalance"


def test_strong_scaling_loses_by_what_does_not_shrink() -> None:
    # Of 90 structures each of 9 ranks has 10: work 0.01 s, but the fixed 0.01 s stays, 9 times its share.
    strong = Conditions("strong", structures=90)
    point = predict_step(WORK, Network(0.0, math.inf), strong, 9, 1.0)
    assert point.seconds == pytest.approx(0.02)
    assert point.efficiency == pytest.approx(0.1 / 9 / 0.02)
    assert point.losses["fixed"] == pytest.approx(0.01 * 8 / 9)
    assert point.bent_by == "fixed"
    assert predict_step(WORK, NETWORK, strong, 1, 1.0).efficiency == pytest.approx(1.0)


def test_a_file_system_that_is_too_slow_is_waited_for() -> None:
    work = Work(fixed=0.01, per_edge=1e-6, edges=1000.0, gradient_bytes=0.0, messages=0, sums=0, structure_bytes=1e4)
    quick = Conditions("weak", structures=90, file_system=9e6)
    # 1 rank reads 0.9 MB in 0.1 s, hidden; 3 ranks read 2.7 MB in 0.3 s: 0.2 s longer than the step.
    assert predict_step(work, NETWORK, quick, 1, 1.0).terms["data"] == pytest.approx(0.0, abs=1e-12)
    point = predict_step(work, NETWORK, quick, 3, 1.0)
    assert point.terms["data"] == pytest.approx(0.2)
    assert point.seconds == pytest.approx(0.3)
    assert point.bent_by == "data"


def test_checkpoints_and_jitter() -> None:
    work = Work(fixed=0.01, per_edge=1e-6, edges=1000.0, gradient_bytes=0.0, messages=0, sums=0, checkpoint=6.0)
    conditions = Conditions("weak", structures=90, checkpoint_minutes=1.0, jitter=0.05)
    point = predict_step(work, NETWORK, conditions, 8, 1.0)
    jitter = 0.05 * math.sqrt(2 * math.log(8)) * 0.1
    assert point.terms["jitter"] == pytest.approx(jitter)
    assert point.terms["checkpoint"] == pytest.approx(0.1 * (0.1 + jitter))


def test_dividing_a_step_over_many_ranks_bends_the_curve() -> None:
    # 0.1 s of one rank and 4 MB to all, and on 1,000 ranks 0.3 s of dividing.
    points = predict_curve(WORK, Network(0.0, math.inf), WEAK, even, (1, 1000), lambda n: 3e-4 * n if n > 1 else 0.0)
    assert [p.seconds for p in points] == [pytest.approx(0.1), pytest.approx(0.4)]
    assert [p.bent_by for p in points] == [None, "division"]
    assert "bent by dividing the step over the ranks" in verdicts(points)[-1]


def test_the_terms_that_bend_the_curve_are_named_with_their_places() -> None:
    def unequal(ranks: int) -> float:
        return 1.02 if 1 < ranks < 1000 else 1.0

    slow = Network(latency=1e-4, bandwidth=1e9)
    work = Work(fixed=0.01, per_edge=1e-6, edges=1000.0, gradient_bytes=100, sums=100)
    points = predict_curve(work, slow, WEAK, unequal, (1, 2, 4, 1000, 16000))
    assert [p.bent_by for p in points] == [None, "latency", "latency", "latency", "latency"]
    # 1,000 ranks: 101 messages x 20 hops x 0.1 ms = 0.202 s beside 0.1 s.
    assert points[3].terms["latency"] == pytest.approx(0.202)
    said = verdicts(points)
    assert said[0].startswith("from 2 to 16,000 ranks the all-reduce (latency) costs most: 16.")
    assert "efficiency falls below 90% at 2 ranks (82%), bent by the all-reduce (latency)" in said
    assert "efficiency falls below 50% at 1,000 ranks (33%), bent by the all-reduce (latency)" in said
    few = verdicts(predict_curve(WORK, NETWORK, WEAK, unequal, (1, 2, 4)))
    assert few[0].startswith("from 2 to 4 ranks the all-reduce (bandwidth) costs most: 3.8% to 5.6%")
    ideal = verdicts(predict_curve(WORK, Network(0.0, math.inf), WEAK, even, (1, 2, 4)))
    assert ideal == ["efficiency stays above 90% up to 4 ranks (100% there)"]

"""The stopwatch: parts are exclusive, add up to the time measured, and stand where a training step spends it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from small_runs import Options, config_of

from dpt_hpc.stopwatch import Stopwatch, measuring, part
from dpt_hpc.train.pretrain import prepare
from dpt_hpc.train.ranks import Ranks


def test_parts_within_parts_count_their_own_time() -> None:
    watch = Stopwatch()
    began = time.perf_counter()
    with watch.run(), part("forward"):
        time.sleep(0.02)
        with part("graph"):
            time.sleep(0.04)
        time.sleep(0.02)
    total = time.perf_counter() - began
    assert watch.seconds["graph"] >= 0.04
    assert 0.04 <= watch.seconds["forward"] < total - 0.04 + 1e-3
    assert sum(watch.seconds.values()) == pytest.approx(total, rel=0.05)
    assert watch.entries == {"other": 1, "forward": 1, "graph": 1}


def test_without_a_stopwatch_parts_do_nothing() -> None:
    assert not measuring()
    assert part("graph") is part("forward")


def test_one_stopwatch_at_a_time_and_an_error_stops_it() -> None:
    watch = Stopwatch()
    with watch.run(), pytest.raises(RuntimeError, match="another stopwatch"), Stopwatch().run():
        pass
    assert not measuring()
    with pytest.raises(ValueError, match="inside"), watch.run(), part("graph"):
        raise ValueError("inside")
    assert not measuring()
    assert set(watch.seconds) == {"other", "graph"}


def test_settle_is_called_where_parts_meet() -> None:
    calls: list[int] = []
    with Stopwatch(lambda: calls.append(1)).run(), part("graph"):
        pass
    assert len(calls) == 4


def test_a_training_step_is_told_by_its_parts(finished: tuple[Options, Path], tmp_path: Path) -> None:
    run, dataset, split, model = prepare(config_of(finished[0], tmp_path / "run"), Ranks(), quiet=True)
    trainer = run.trainer(dataset, split, model, {})
    assert not (tmp_path / "run").exists()
    trainer.objective.train()
    watch = Stopwatch()
    with watch.run(), trainer.load() as loader:
        trainer.train_step(*next(iter(loader)))
    assert {"data", "graph", "forward", "backward", "update", "other"} <= set(watch.seconds)
    assert watch.entries["graph"] == watch.entries["forward"] == watch.entries["backward"] == 1
    assert all(seconds > 0 for seconds in watch.seconds.values())

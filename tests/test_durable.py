"""Files that decide how a run goes on are on the disk before they have their names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from small_runs import Options, config_of

from dpt_hpc.train import monitor
from dpt_hpc.train.counting import Counts
from dpt_hpc.train.growing import GrowingArrays
from dpt_hpc.train.monitor import Monitor, write_json
from dpt_hpc.train.run_dir import save_config


def test_what_a_resume_reads_is_on_the_disk_before_it_has_its_name(
    finished: tuple[Options, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No power can be cut here: what is seen onto the disk is recorded, and each file as it was then."""
    seen: dict[int, int] = {}
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        facts = os.fstat(descriptor)
        seen[facts.st_ino] = facts.st_size

    monkeypatch.setattr(os, "fsync", record)
    save_config(config_of(finished[0], tmp_path), tmp_path / "config.yaml")
    write_json(tmp_path / "run.json", {"started": "now"})
    Counts(np.arange(3), "key").save(tmp_path)
    parts = GrowingArrays(tmp_path / "split.npz")
    parts.add({"train": np.arange(3)})
    parts.publish()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    Monitor(tmp_path, step=1, quiet=True).close()
    names = ("config.yaml", "run.json", "edges.npz", "split.npz", "metrics.jsonl")
    for name in names:
        facts = (tmp_path / name).stat()
        assert facts.st_size > 0
        assert seen.get(facts.st_ino) == facts.st_size, name
    assert tmp_path.stat().st_ino in seen  # their names


def test_a_full_disk_is_warned_of_once_however_slow_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warning goes to the log that cannot be written, too."""
    monkeypatch.setattr(monitor, "SECONDS_BETWEEN_FLUSHES", -1.0)  # as if every write took long
    watched = Monitor(tmp_path, quiet=True)
    with open("/dev/full", "ab", buffering=0) as full:
        monkeypatch.setattr(watched, "_log", full)
        watched.step(1, 1, {"loss": 1.0})
        watched.step(1, 2, {"loss": 1.0})
        watched.close()
    assert capsys.readouterr().err.count("its log cannot be written") == 1

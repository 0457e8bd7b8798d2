"""A run goes on where it stood, bit for bit, whatever ended it; and never on top of another one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import FALLING, Options, of_steps, records, run, small_options

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import ConfigError
from dpt_hpc.train.checkpoint import find_checkpoint, load_weights


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_kill_and_resume_equals_uninterrupted_bit_for_bit(
    finished: tuple[Options, Path], tmp_path: Path, ema_decay: float | None
) -> None:
    options = deepcopy(finished[0]) | {"schedule": FALLING}
    options["training"] |= {"epochs": 8, "ema_decay": ema_decay}
    whole = run(options, tmp_path / "whole")
    broken = tmp_path / "broken"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options | {"task": "pretrain", "run_dir": str(broken)}))
    command = [sys.executable, "-m", "dpt_hpc", "pretrain", str(tmp_path / "config.yaml"), "--quiet"]
    with subprocess.Popen(command) as process:
        # Step 12 is in the middle of the third epoch, after the learning rate has fallen once.
        while process.poll() is None and not any(
            int(path.name[5:]) >= 12 for path in (broken / "checkpoints").glob("step_*")
        ):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    killed_at = int((broken / "checkpoints" / "last").resolve().name[5:])
    assert 10 <= killed_at < 40
    subprocess.run([*command, "--resume"], check=True)
    for name in ("last", "best"):
        a, b = load_weights(whole / "checkpoints" / name), load_weights(broken / "checkpoints" / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    for name in ("step", "loss", "learning_rate", "grad_norm"):
        assert of_steps(whole, name) == of_steps(broken, name), name
    rates = of_steps(broken, "learning_rate")
    assert rates[0] == 0.002
    assert rates[10] == 0.001
    assert rates[-1] < 1e-4
    assert [r["validation"] for r in records(whole, "epoch")] == [r["validation"] for r in records(broken, "epoch")]


def test_resume_refuses_other_options_and_other_directories(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, path = finished
    with pytest.raises(ConfigError, match=r"already holds a run.*\n.*--resume"):
        run(options, path)
    changed = options | {"optimizer": {"learning_rate": 1e-3}}
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: was 0\.002, now 0\.001"):
        run(changed, path, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"run_dir .*: is not empty, and holds no run.*\n.*--set run_dir=DIR"):
            run(options, tmp_path, resume=resume)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_resume_refuses_other_data_under_the_same_name(small_dataset: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(small_dataset, tmp_path / "data"))
    options = small_options(dataset)
    options["training"]["epochs"] = 1
    path = run(options, tmp_path / "run")
    before = (path / "run.json").read_text()
    sample = Dataset.open(small_dataset)
    shutil.rmtree(dataset)
    write_dataset([sample.get(i) for i in range(40)], dataset, provenance={}, property_units={"volume_per_atom": "A^3"})
    options["training"]["epochs"] = 2
    with pytest.raises(ConfigError, match=r"its dataset has changed since it began.*\n.*an early.*--set run_dir=DIR"):
        run(options, path, resume=True)
    assert (path / "run.json").read_text() == before


def test_a_copy_of_a_run_that_has_lost_its_links_goes_on(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, path = finished
    copy = Path(shutil.copytree(path, tmp_path / "copy", symlinks=False))
    assert not (copy / "checkpoints" / "last").is_symlink()
    changed = deepcopy(options)
    changed["training"]["epochs"] += 1
    run(changed, copy, resume=True)
    assert (copy / "checkpoints" / "last").is_symlink()
    assert of_steps(copy, "loss")[: len(of_steps(path, "loss"))] == of_steps(path, "loss")
    assert of_steps(copy, "step") == list(range(1, 21))


def test_a_finished_run_leaves_its_latest_checkpoints_and_the_best(finished: tuple[Options, Path]) -> None:
    _, path = finished
    directory = path / "checkpoints"
    assert not list(directory.glob(".partial*"))
    assert find_checkpoint(path) == (directory / "best").resolve()
    steps = sorted(p.name for p in directory.glob("step_*"))
    assert (directory / "last").resolve().name == steps[-1] == "step_00000015"
    assert len(steps) <= 3  # two latest, and the best

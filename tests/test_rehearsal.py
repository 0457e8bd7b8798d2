"""`--check`: figures of the run to come, nothing written, and the run's own errors before it begins."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import yaml
from small_runs import Options, config_of, finetune_options
from test_parallel import needs_mpi, start, written

from dpt_hpc.cli import run_command_line
from dpt_hpc.doctor.rehearsal import lines, rehearse
from dpt_hpc.errors import ConfigError, EnvironmentFault
from dpt_hpc.train.job import find_job_end, seconds_left, told_end
from dpt_hpc.train.ranks import Ranks


def test_it_tells_what_the_run_would_take_and_writes_nothing(
    finished: tuple[Options, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, run = finished
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options | {"task": "pretrain", "run_dir": str(tmp_path / "new" / "run")}))
    run_command_line(["pretrain", str(config), "--check", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == [config]
    before = json.loads((run / "run.json").read_text())
    assert {part: found[part] for part in before["split"]} == before["split"]
    assert found["steps_per_epoch"] == 5
    assert found["seconds"] == pytest.approx(found["seconds_per_epoch"] * options["training"]["epochs"])
    assert 0 < found["memory_bytes"] < found["free_memory_bytes"]
    run_command_line(["run", str(config), "--check"])
    assert "ready: nothing was written" in capsys.readouterr().out.splitlines()[-1]


def test_a_fine_tuning_is_tried_from_its_pretrained_weights(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, run = finished
    found = rehearse(finetune_options(options, tmp_path / "run", pretrained=str(run)), Ranks())
    assert found["seeds"] == 2
    assert "of each of 2 seeds" in "\n".join(lines(found))
    other = finetune_options(
        options | {"model": options["model"] | {"hidden": 8}}, tmp_path / "run", pretrained=str(run)
    )
    with pytest.raises(ConfigError, match=r"model.hidden: pre-trained with 16, configured 8"):
        rehearse(other, Ranks())


def test_a_run_directory_that_is_taken_is_told(finished: tuple[Options, Path]) -> None:
    options, run = finished
    with pytest.raises(ConfigError, match="already holds a run"):
        rehearse(config_of(options, run), Ranks())
    files = sorted(run.rglob("*"))
    rehearse(config_of(options, run), Ranks(), resume=True)
    assert sorted(run.rglob("*")) == files


@needs_mpi
@pytest.mark.slow
def test_two_ranks_try_it_together_and_one_speaks(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, _ = finished
    config = written(tmp_path / "config.yaml", options | {"task": "pretrain"}, tmp_path / "new")
    done = start(2, config, "--check", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["steps_per_epoch"] == 5, "training.batch_size is of all ranks together"
    assert list(tmp_path.iterdir()) == [config]
    config = written(tmp_path / "config.yaml", options | {"task": "pretrain"}, tmp_path / "new")
    wrong = start(2, config, "--check", "--set", "data.path=nowhere")
    assert wrong.returncode == 3
    assert (wrong.stdout + wrong.stderr).count("error: ") == 1, wrong.stderr
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_told(finished: tuple[Options, Path], tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(EnvironmentFault, match=r"cannot be made: .* cannot be written\.\nGet write access"):
        rehearse(config_of(finished[0], tmp_path / "run"), Ranks())


def test_a_file_in_the_place_of_a_directory_is_told(finished: tuple[Options, Path], tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(EnvironmentFault, match=r"cannot be made: .*runs is a file\.\n"):
        rehearse(config_of(finished[0], tmp_path / "runs" / "run"), Ranks())


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("1-02:03:04", 93784.0), ("2:03:04", 7384.0), ("3:04", 184.0), ("4", 4.0), ("UNLIMITED", None), ("", None)],
)
def test_squeue_tells_the_time_that_is_left(said: str, seconds: float | None) -> None:
    assert seconds_left(said) == seconds


def test_the_end_of_the_job_is_that_of_its_environment_else_of_squeue(tmp_path: Path) -> None:
    assert find_job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1800000000"}) == 1.8e9
    assert find_job_end({"PATH": str(tmp_path)}) is None
    assert find_job_end({"PATH": str(tmp_path), "SLURM_JOB_ID": "7"}) is None
    (tmp_path / "squeue").write_text('#!/bin/sh\n[ "$3" = 7 ] && echo 1:00:00\n')
    (tmp_path / "squeue").chmod(0o755)
    asked = {"PATH": str(tmp_path), "SLURM_JOB_ID": "7"}
    assert find_job_end(asked) is not None
    assert find_job_end(asked | {"SLURM_JOB_ID": "8"}) is None


def test_whether_the_job_lasts_is_told() -> None:
    assert "before the job's end" in told_end(10, 4e9)
    assert "AFTER the job's end" in told_end(10, 1e9)
    assert "job" not in told_end(10, None)

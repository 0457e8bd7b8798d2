"""The command line: help everywhere, one message for a mistake, exit codes that scripts can read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dpt_hpc import __version__
from dpt_hpc.cli import run_command_line
from dpt_hpc.quickstart import configs

VERBS = [
    "ingest",
    "inspect",
    "pretrain",
    "finetune",
    "evaluate",
    "predict",
    "embed",
    "export",
    "report",
    "watch",
    "quickstart",
    "doctor",
]
PRETRAIN = str(configs() / "pretrain" / "cgcnn_1_500_500.yaml")


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run a command that must end with `code`; returns its message."""
    with pytest.raises(SystemExit) as caught:
        run_command_line(arguments)
    assert caught.value.code == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_the_program_lists_its_verbs_and_its_version() -> None:
    module = [sys.executable, "-m", "dpt_hpc"]
    text = subprocess.run([*module, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(verb in text for verb in VERBS)
    assert __version__ in subprocess.run([*module, "--version"], capture_output=True, text=True, check=True).stdout
    assert subprocess.run([*module, "pretrian"], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line([verb, "--help"])
    text = capsys.readouterr().out
    assert "Example: dpt-hpc " in text.replace("\n", " ")


def test_a_wrong_option_is_a_message_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, 1, "pretrain", PRETRAIN, "--set", "training.epoch=3")
    assert "training.epoch: unknown option; did you mean training.epochs?" in message
    assert "no such file" in fails(capsys, 1, "pretrain", "nowhere.yaml")


def test_wrong_data_is_a_message_and_exit_code_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = fails(capsys, 3, "pretrain", PRETRAIN, "--set", f"data.path={tmp_path}", "--set", f"run_dir={tmp_path}/r")
    assert str(tmp_path) in message
    assert not (tmp_path / "r").exists()
    assert "neither a checkpoint" in fails(capsys, 3, "evaluate", str(tmp_path), str(tmp_path))


def test_debug_shows_where_it_happened(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpt_hpc", "--debug", "pretrain", str(tmp_path / "nowhere.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "nowhere.yaml: no such file" in done.stderr


def test_a_config_without_a_task_cannot_be_launched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    assert "task is None, expected one of pretrain, finetune" in fails(capsys, 1, "run", str(tmp_path / "c.yaml"))


def test_quickstart_overwrites_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    assert "not empty" in fails(capsys, 1, "quickstart", "--out", str(tmp_path))
    (tmp_path / "report.html").touch()
    run_command_line(["quickstart", "--out", str(tmp_path)])
    assert "Already done" in capsys.readouterr().out


def test_ingest_takes_the_options_its_messages_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpt_hpc.data.ingest.consistency.FEWEST", 2)
    frame = '{}\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 energy={} stress="{} 0 0 0 9 0 0 0 9"\n'
    pairs = "".join(frame.format(2, -i, 9 + i) + "Cu 0 0 0\nCu 1.5 1.5 1.5\n" for i in range(4))
    (tmp_path / "a.xyz").write_text(pairs + frame.format(1, -3, 9) + "Cu 0 0 0\n")
    command = ["ingest", str(tmp_path / "a.xyz"), "--out", str(tmp_path / "out"), "--min-atoms", "2"]
    assert "--no-check ingests it nevertheless" in fails(capsys, 3, *command)
    run_command_line([*command, "--no-check"])
    assert "5 records, 4 kept; 1 under 2 atoms" in capsys.readouterr().out

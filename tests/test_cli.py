"""The command line: help everywhere, one message for a mistake, exit codes that scripts can read."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import Options

from dpt_hpc import __version__
from dpt_hpc.cli import run_command_line
from dpt_hpc.cli.app import JOURNEY
from dpt_hpc.errors import EXIT_CODES, ConfigError, DataError, DptError, EnvironmentFault, RankLost
from dpt_hpc.quickstart import PACKAGE, configs
from dpt_hpc.train import signals

PRETRAIN = str(configs() / "pretrain" / "cgcnn_1_500_500.yaml")
FINETUNE = str(configs() / "finetune" / "cgcnn_jdft.yaml")
SAMPLE = PACKAGE / "sample" / "elastic.json.gz"


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run a command that must end with `code`; returns its message."""
    with pytest.raises(SystemExit) as caught:
        run_command_line(arguments)
    assert caught.value.code == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def program(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program as a process of its own, with more environment variables."""
    command = [sys.executable, "-m", "dpt_hpc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)


def test_the_overview_lists_verbs_in_the_order_of_their_use_and_the_exit_codes() -> None:
    text = " ".join(program("--help").stdout.split())
    places = [text.index(f"│ {verb} ") for verb in itertools.chain(*JOURNEY.values())]
    assert places == sorted(places)
    assert all(f"{code} {meaning}" in text for code, meaning in EXIT_CODES.items())
    assert __version__ in program("--version").stdout
    assert program().stdout.split() == program("--help").stdout.split()


def test_help_and_completion_do_not_wait_for_torch() -> None:
    found = "import sys, dpt_hpc.cli; print(sorted({'torch', 'numpy', 'h5py', 'pydantic', 'ase'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (f"pretrain {PRETRAIN} --set trainig.epochs=3", 1, "did you mean training"),
        (f"finetune {FINETUNE} --set training.epochs=-3 --set model.name=cgcn", 1, "Did you mean cgcnn?"),
        (f"run {PRETRAIN} --set model.cutoff=0", 1, "cutoff is 0"),
        (f"config check {PRETRAIN} --set trainig.epochs=3", 1, "did you mean training"),
        (f"doctor {PRETRAIN} --set trainig.epochs=3", 1, "did you mean training"),
        (f"bench scaling {PRETRAIN} --set trainig.epochs=3", 1, "did you mean training"),
        ("config schema pretrain", 0, '"properties"'),
        ("config schema pretran", 1, "Did you mean pretrain?"),
        ("pretrian", 2, "Did you mean 'pretrain'?"),
    ],
)
def test_a_wrong_option_does_not_wait_for_torch(line: str, code: int, told: str) -> None:
    found = (
        "import sys\n"
        "from dpt_hpc.cli import run_command_line\n"
        "try:\n"
        "    run_command_line(sys.argv[1:])\n"
        "finally:\n"
        "    print('\\nheavy:', sorted({'torch', 'numpy', 'h5py', 'ase'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", found, *line.split()], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "completed"),
    [("dpt-hpc pre", {"pretrain", "predict"}), ("dpt-hpc data get jd", {"jdft"}), ("dpt-hpc config job sl", {"slurm"})],
)
def test_a_shell_completes_verbs_and_names(line: str, completed: set[str]) -> None:
    """As the function does that --install-completion writes, with what bash tells it."""
    asked = {"_DPT_HPC_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    script = Path(sys.executable).with_name("dpt-hpc")
    done = subprocess.run([script], capture_output=True, text=True, check=False, env=os.environ | asked)
    assert set(done.stdout.split()) == completed, done.stderr


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (["pretrian"], "Did you mean 'pretrain'?"),
        (["config", "shw"], "Did you mean 'show'?"),
        (["inspect", "x", "--jsn"], "--json"),
        (["config", "init", "pretrian"], "TASK pretrian: expected one of pretrain, finetune. Did you mean pretrain?"),
        (["config", "init", "pretrain", "--network", "cgnn"], "Did you mean cgcnn?"),
        (["data", "show", "jdff"], "Did you mean jdft?"),
        (["ingest", str(SAMPLE), "--out", "x", "--format", "extxzy"], "Did you mean extxyz?"),
        (["ingest", str(SAMPLE), "--out", "x", "--energy-unit", "ev"], "Did you mean eV?"),
        (["ingest", str(SAMPLE), "--out", "x", "--require", "force"], "Did you mean forces?"),
        (["config", "check", PRETRAIN, "--set", "model.name=cgnn"], "Did you mean cgcnn?"),
        (["config", "check", PRETRAIN, "--set", "data.store=nodes"], "Did you mean node?"),
        (["config", "job", "slrm"], "Did you mean slurm?"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest_right_one(
    wrong: list[str], right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command_line(wrong)
    assert right in capsys.readouterr().err


def test_an_error_of_a_script_is_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    for words, kind, code in (
        (["inspect", "nowhere"], "DataError", 3),
        (["config", "check", "nowhere.yaml"], "ConfigError", 1),
        (["inspect"], "UsageError", 2),
    ):
        with pytest.raises(SystemExit) as caught:
            run_command_line([*words, "--json"])
        told = json.loads(capsys.readouterr().out)["error"]
        assert (told["kind"], told["exit_code"], caught.value.code) == (kind, code, code)
        assert told["message"]


def test_exit_codes_are_those_of_the_table() -> None:
    for fault in (DptError, ConfigError, DataError, EnvironmentFault, RankLost):
        assert fault("").exit_code in EXIT_CODES
    assert {signals.EXIT_REQUEUE, signals.EXIT_INTERRUPTED} <= set(EXIT_CODES)


def test_a_reader_that_stops_reading_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m dpt_hpc config job slurm | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_locale_without_our_letters_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    run_command_line(["config", "init", "pretrain"])
    ascii_only.seek(0)
    assert "\n  # ?\n" in ascii_only.read()


def test_a_file_that_cannot_be_read_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "Is a directory" in fails(capsys, 1, "config", "check", str(tmp_path))
    (tmp_path / "empty.yaml").touch()
    told = fails(capsys, 1, "config", "check", str(tmp_path / "empty.yaml"))
    assert "empty.yaml: is empty.\nWrite one with `dpt-hpc config init" in told
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in fails(capsys, 1, "config", "check", str(tmp_path / "binary.yaml"))


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options = finished[0] | {"task": "pretrain", "run_dir": str(tmp_path / "run")}
    options["training"] = options["training"] | {"epochs": 500}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, "-u", "-m", "dpt_hpc", "pretrain", str(tmp_path / "c.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "epoch 1/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    assert process.returncode == signals.EXIT_INTERRUPTED, told
    assert "Ctrl-C once more ends at once" in told
    assert "all is saved up to step" in told
    assert "Go on with --resume." in told
    run_command_line(["pretrain", str(tmp_path / "c.yaml"), "--resume", "--set", "training.epochs=2", "--quiet"])


def test_a_wrong_option_is_a_message_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, 1, "pretrain", PRETRAIN, "--set", "training.epoch=3")
    assert "training.epoch: unknown option; did you mean training.epochs?" in message
    assert "no such file" in fails(capsys, 1, "pretrain", "nowhere.yaml")


def test_wrong_data_is_a_message_and_exit_code_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = fails(capsys, 3, "pretrain", PRETRAIN, "--set", f"data.path={tmp_path}", "--set", f"run_dir={tmp_path}/r")
    assert str(tmp_path) in message
    assert not (tmp_path / "r").exists()
    assert "neither a checkpoint" in fails(capsys, 3, "evaluate", str(tmp_path), str(tmp_path))


@pytest.mark.parametrize("line", ["--debug config job slrm", "config job slrm --debug"])
def test_debug_shows_where_it_happened(line: str) -> None:
    done = program(*line.split())
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "error: KIND slrm: expected one of" in done.stderr


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

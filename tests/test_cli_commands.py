"""Every public command, run on real data as a user would run it; one that is not in the table fails the test."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import pytest
import typer.main
import yaml
from ase.build import bulk
from small_runs import Options
from test_cli import fails

from dpt_hpc.cli import app, run_command_line
from dpt_hpc.cli.app import JOURNEY
from dpt_hpc.quickstart import PACKAGE, configs

SAMPLE = PACKAGE / "sample"
JSON = {
    "data list": "data list --catalog {catalog}",
    "data show": "data show tiny --catalog {catalog}",
    "data get": "data get tiny --catalog {catalog} --mirror {mirror} --out {new}",
    "data mirror": "data mirror {new} tiny --catalog {catalog} --mirror {mirror}",
    "data leaks": "data leaks {data} {data} --by composition",
    "ingest": f"ingest {SAMPLE}/elastic.json.gz --out {{new}} --limit 20",
    "inspect": "inspect {data}",
    "config show": "config show {pretraining}",
    "config check": "config check {finetuning}",
    "pretrain": "pretrain {pretraining} --set run_dir={new}",
    "finetune": "finetune {finetuning} --set run_dir={new}",
    "run": "run {pretraining} --set run_dir={new} --check",
    "suite": "suite {suite} --status",
    "report": "report {run} --out {new}",
    "evaluate": "evaluate {run} {data}",
    "models": "models {run}",
    "predict": "predict {run} {data} -o {new}.csv",
    "embed": "embed {run} {data} -o {new}.npz",
    "export": "export {run} -o {new}.safetensors",
    "bench scaling": "bench scaling {pretraining} --structures 4 --steps 2 --warm-up 0 --out {new}",
    "doctor": "doctor {pretraining}",
}
"""Commands that yield a result: each is run with --json, and answers with one document."""
PLAIN = {
    "config init": ("config init finetune --network schnet", "name: schnet"),
    "config schema": ("config schema pretrain", '"properties"'),
    "config job": ("config job slurm --nodes 2", "#SBATCH --nodes=2"),
    "quickstart": ("quickstart --out {done}", "Already done"),
}
"""Commands that print text, and what of it. The quickstart itself is run by .ci/run."""
SERVERS = {"watch": "watch {run}"}


def commands(group: Any = None, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of the application by its words."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def epilogs() -> Iterator[tuple[str, str]]:
    """Every help page by its words, groups and the overview included, and how it ends."""
    root: Any = typer.main.get_command(app)
    yield "", root.epilog
    yield from ((name, command.epilog) for name, command in root.commands.items())
    yield from ((name, command.epilog) for name, command in commands() if " " in name)


@pytest.fixture(scope="module")
def places(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What the commands speak of: a dataset, a run, configs, a suite, a catalog with its mirror."""
    folder = tmp_path_factory.mktemp("commands")
    options, run = finished
    pretraining = options | {"task": "pretrain", "training": {"epochs": 1, "batch_size": 8}, "run_dir": "unused"}
    finetuning: Options = {k: v for k, v in pretraining.items() if k != "seed"} | {"task": "finetune", "seeds": [0]}
    finetuning["objective"] = {"kind": "property", "target": "volume_per_atom"}
    finetuning["pretrained"] = str(run)
    (folder / "suite").mkdir()
    network = {
        "pretrainings": {"forces": {"config": "../pretraining.yaml"}},
        "datasets": {"small": {"config": "../finetuning.yaml"}},
    }
    cells = [{"network": "cgcnn", "pretrainings": ["baseline", "forces"]}]
    suite = {"run_dir": str(folder / "cells"), "networks": {"cgcnn": network}, "cells": cells}
    frames = b'1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 energy=-3\nCu 0 0 0\n'
    (folder / "mirror").mkdir()
    (folder / "mirror" / "tiny.xyz").write_bytes(frames)
    digest = hashlib.sha256(frames).hexdigest()
    entry = {
        "name": "tiny", "about": "One crystal.", "labels": "energy (eV)", "records": 1, "structures": None,
        "licence": "CC0", "citation": "Nobody", "doi": "10.0000/nothing", "tried": False, "ingested": False,
        "files": [{"name": "tiny.xyz", "url": None, "sha256": digest, "size": len(frames)}], "ingest": {},
    }  # fmt: skip
    files = {
        "pretraining": folder / "pretraining.yaml",
        "finetuning": folder / "finetuning.yaml",
        "suite": folder / "suite" / "suite.yaml",
        "catalog": folder / "catalog.yaml",
    }
    for content, file in zip((pretraining, finetuning, suite, [entry]), files.values(), strict=True):
        file.write_text(yaml.safe_dump(content))
    (folder / "done").mkdir()
    (folder / "done" / "report.html").touch()
    others = {"data": small_dataset, "run": run, "mirror": folder / "mirror", "done": folder / "done"}
    return {name: str(path) for name, path in (files | others).items()}


def words(line: str, places: dict[str, str], new: Path) -> list[str]:
    return shlex.split(line.format(new=new, **places))


def test_every_command_is_run_below_and_has_its_place_in_the_overview() -> None:
    assert {name for name, _ in commands()} == {*JSON, *PLAIN, *SERVERS}
    verbs = {name.split()[0] for name, command in commands() if not command.hidden}
    assert verbs == {verb for verbs in JOURNEY.values() for verb in verbs}


@pytest.mark.parametrize("command", JSON)
def test_a_command_with_a_result_tells_it_as_one_json_document(
    command: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--json" in {option for parameter in dict(commands())[command].params for option in parameter.opts}
    run_command_line([*words(JSON[command], places, tmp_path / "new"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told
    assert "error" not in told


@pytest.mark.parametrize("command", PLAIN)
def test_a_command_that_prints_text(
    command: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, expected = PLAIN[command]
    run_command_line(words(line, places, tmp_path / "new"))
    assert expected in capsys.readouterr().out


def test_watch_serves_until_it_is_interrupted(places: dict[str, str]) -> None:
    command = [sys.executable, "-u", "-m", "dpt_hpc", *words(SERVERS["watch"], places, Path())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        (address,) = re.findall(r"http://127\.0\.0\.1:\S+", process.stdout.readline())
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize(("name", "epilog"), list(epilogs()))
def test_every_help_ends_with_an_example_that_can_be_typed(name: str, epilog: str) -> None:
    examples = [shlex.split(line) for line in re.findall(r"`(dpt-hpc [^`]+)`", epilog or "")]
    assert any(line[1 : 1 + len(name.split())] == name.split() for line in examples)
    known: Any = dict(commands())
    for line in examples:
        command = next((known[verb] for k in (3, 2) if (verb := " ".join(line[1:k])) in known), None)
        assert command is not None, line
        rest = line[2:] if command.name == line[1] else line[3:]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if word.startswith("-")} <= {*options, "--help"}, line
        for word in rest:
            if word.startswith("configs/"):
                assert (configs().parent / word).is_file(), line


def test_what_is_there_is_not_written_over(
    finished: tuple[Options, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ase.io.write(tmp_path / "cu.cif", bulk("Cu"))
    for verb, suffix in (("predict", ".csv"), ("embed", ".npz")):
        out = tmp_path / f"out{suffix}"
        out.write_text("a year's work")
        command = [verb, str(finished[1]), str(tmp_path / "cu.cif"), "-o", str(out), "-q"]
        assert f"--out: {out} is there already" in fails(capsys, 1, *command)
        assert out.read_text() == "a year's work"
        run_command_line([*command, "--force"])
        assert out.read_bytes() != b"a year's work"

"""Models that ship with dpt_hpc: each by its name, with a card that says what it is; and the verb that lists them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ase.build import bulk
from small_runs import Options, finetune_options
from test_cli import fails

import dpt_hpc
from dpt_hpc.cli import run_command_line
from dpt_hpc.errors import DataError
from dpt_hpc.quickstart import configs
from dpt_hpc.report.comparison import start_of
from dpt_hpc.report.runs import FineTuning, load_runs
from dpt_hpc.train import shipped
from dpt_hpc.train.checkpoint import find_checkpoint
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.config_file import load_config
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.shipped import shipped_models
from dpt_hpc.use.work import export

NAMES = sorted(shipped_models())


def test_there_are_some() -> None:
    assert "cgcnn_1_500_500" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_is_and_works(name: str) -> None:
    model = dpt_hpc.load(name)
    card = model.card
    assert card.training["epoch"] >= 1
    assert card.training["test"]["forces_mae"] > 0
    assert all(data["licence"] and data["citation"] for data in card.trained_on["dataset"])
    assert not [word for word in ("/home", "/root", "/work", "/tmp") if word in card.text()]
    config = load_config(configs() / "pretrain" / f"{name}.yaml", PretrainConfig)
    assert card.objective == config.objective.model_dump()
    atoms = bulk("Si", "diamond", a=5.43)
    rest = model.predict(atoms)
    assert rest.forces is not None
    assert abs(rest.forces).max() < 1e-3, "by symmetry"
    atoms.positions[1] += 0.1
    pushed = model.predict(atoms)
    assert pushed.forces is not None
    assert pushed.forces[1] @ [1, 1, 1] < 0, "back to its place"


@pytest.fixture
def tiny(finished: tuple[Options, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model that ships with dpt_hpc for the time of a test."""
    export(finished[1], tmp_path / "weights" / "tiny.safetensors")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    return "tiny"


def test_a_fine_tuning_begins_from_a_name(finished: tuple[Options, Path], tiny: str, tmp_path: Path) -> None:
    for name, pretrained in (("by_name", tiny), ("by_path", str(finished[1]))):
        finetune(finetune_options(finished[0], tmp_path / name, seeds=[0], pretrained=pretrained), Ranks(), quiet=True)
    first = json.loads((tmp_path / "by_name" / "seed_0" / "run.json").read_text())["pretrained"]
    assert first["trained_on"] == dpt_hpc.load(tiny).card.trained_on
    (run,) = load_runs([tmp_path / "by_name"])
    assert isinstance(run, FineTuning)
    start = start_of(run, [])
    assert start.row == "forces_1:500:500"
    assert start.epochs == dpt_hpc.load(tiny).card.training["epochs"]
    assert start.structures == first["trained_on"]["split"]["train"]
    a, b = ((tmp_path / name / "seed_0" / "metrics.jsonl").read_text() for name in ("by_name", "by_path"))
    assert json.loads(a.splitlines()[-1])["validation"] == json.loads(b.splitlines()[-1])["validation"]


def test_what_is_there_comes_before_a_name(
    finished: tuple[Options, Path], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(tiny) == tmp_path / "weights" / "tiny.safetensors"
    (tmp_path / tiny).symlink_to(finished[1])
    assert find_checkpoint(tiny).is_relative_to(finished[1])
    with pytest.raises(DataError, match="an exported model, or one that ships with dpt_hpc: tiny"):
        find_checkpoint("tinny")


def test_the_verb_lists_them_and_shows_a_card(
    finished: tuple[Options, Path], tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command_line(["models", "--json"])
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["name"] == "tiny"
    assert entry["network"] == "cgcnn"
    assert entry["errors"]["forces"]["unit"] == "eV/Å"
    run_command_line(["models"])
    listed = capsys.readouterr().out
    assert entry["weights_sha256"] in listed
    assert f"forces {entry['errors']['forces']['mae']:.3g} eV/Å" in listed
    for what in (tiny, str(finished[1]), str(finished[1] / "checkpoints" / "best" / "model.yaml")):
        run_command_line(["models", what])
        assert "hidden: 16" in capsys.readouterr().out
    run_command_line(["models", tiny, "--json"])
    assert json.loads(capsys.readouterr().out)["model"]["hidden"] == 16
    assert "no such file or directory" in fails(capsys, 3, "models", "tinny")

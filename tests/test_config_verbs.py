"""`dpt-hpc config`: what it writes is valid, complete and explained; what it checks is really there."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from dpt_hpc.cli import run_command_line
from dpt_hpc.errors import ConfigError
from dpt_hpc.network_options import ModelOptions
from dpt_hpc.quickstart import PACKAGE, configs
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.config_file import load_config
from dpt_hpc.train.config_template import EXAMPLES, members, template

PRESET = configs() / "pretrain" / "cgcnn_1_500_500.yaml"
KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
CHOICES = [
    (task, network, objective)
    for task, kind in KINDS.items()
    for network in members(kind, "model")
    for objective in members(kind, "objective")
]


@pytest.mark.parametrize(("task", "network", "objective"), CHOICES)
def test_a_written_config_is_that_of_the_defaults(task: str, network: str, objective: str, tmp_path: Path) -> None:
    kind: Any = KINDS[task]
    file = tmp_path / "new" / "mine.yaml"
    run_command_line(["config", "init", task, "--network", network, "--objective", objective, "--out", str(file)])
    least: dict[str, Any] = {"run_dir": "runs/mine", "data": {"path": "data/mine"}, "model": {"name": network}}
    least["objective"] = {"kind": objective}
    if objective == "property":
        least["objective"]["target"] = EXAMPLES["objective.target"]
    assert load_config(file, kind) == kind.model_validate(least)


def test_every_option_is_written_and_explained() -> None:
    text = template(PretrainConfig, {})

    def keys(content: Any) -> set[str]:
        return set(content) | {k for v in content.values() if isinstance(v, dict) for k in keys(v)}

    written = keys(yaml.safe_load(text))
    resolved = load_config(PRESET, PretrainConfig).model_dump(mode="json")
    assert written == keys(resolved)
    assert "  # auto | disk | node | cluster\n  store: auto" in text
    assert "  # sum or mean of the nodes of a structure\n  # add | mean\n  pooling: add" in text
    assert (
        "kept changes, under any envelope\n  # cosine | polynomial | gate | null\n  envelope: null" in text
    )  # the whole


@pytest.mark.parametrize("kind", get_args(ModelOptions), ids=lambda kind: kind.name)
def test_every_option_of_a_network_is_explained(kind: type) -> None:
    described = {line.partition(":")[0].strip() for line in (kind.__doc__ or "").splitlines() if ":" in line}
    assert {field.name for field in fields(kind)} <= described


def test_init_refuses_what_is_not_there_and_what_is(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        run_command_line(["config", "init", "pretrain", "--network", "cgnn"])
    assert end.value.code == ConfigError.exit_code
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        run_command_line(["config", "init", "pretrain", "--out", str(tmp_path / "mine.yaml")])
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_show_spells_out_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line(["config", "show", str(PRESET), "--set", "training.epochs=7"])
    shown = yaml.safe_load(capsys.readouterr().out)
    run_command_line(["config", "show", str(PRESET), "--set", "training.epochs=7", "--json"])
    assert shown == json.loads(capsys.readouterr().out)
    assert shown == load_config(PRESET, PretrainConfig, ["training.epochs=7"]).model_dump(mode="json")


def test_check_looks_at_the_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    changes = ["--set", f"data.path={PACKAGE / 'sample' / 'mlearn'}", "--set", "data.split.by=structure"]
    run_command_line(["config", "check", str(PRESET), *changes])
    assert "valid; 462 / 28 / 87 structures to train, validate, test" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_command_line(["config", "check", str(PRESET), "--set", f"data.path={tmp_path / 'nowhere'}"])
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command_line(["config", "check", str(PRESET), *changes, "--set", "training.epoch=3"])
    assert "did you mean training.epochs?" in capsys.readouterr().err


@pytest.mark.parametrize("task", KINDS)
def test_the_schema_knows_every_option_and_no_other(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line(["config", "schema", task])
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(KINDS[task].model_fields)
    assert all(group["additionalProperties"] is False for group in [schema, *schema["$defs"].values()])
    assert schema["$defs"]["DataOptions"]["properties"]["store"]["enum"] == ["auto", "disk", "node", "cluster"]
    assert schema["$defs"]["DataOptions"]["properties"]["store"]["description"]

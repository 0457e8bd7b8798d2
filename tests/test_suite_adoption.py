"""What a suite takes for the results of its cells, and what it says of runs that are others than they seem."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_suite import run_all, write_suite
from typer.testing import CliRunner

from dpt_hpc.cli import app
from dpt_hpc.suite.outcome import write_outcome
from dpt_hpc.suite.plan import Plan, plan_suite
from dpt_hpc.suite.work import CellsFailed
from dpt_hpc.train.compat import SIZES

SUITE = {
    "networks": {
        "cgcnn": {
            "pretrainings": {"forces": {"config": "pretrain.yaml"}},
            "datasets": {"jdft": {"config": "finetune.yaml"}},
        }
    },
    "cells": [{"network": "cgcnn", "pretrainings": ["baseline", "forces"]}],
    "leaks": "leaks.json",
}
LABEL = "forces 1 : 500 : 500, 1 epoch"
BASELINE, TUNED, PRETRAINED = "cgcnn/add/baseline/jdft", "cgcnn/add/forces/jdft", "cgcnn/pretrain/forces"


@pytest.fixture(scope="module")
def done(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a suite of which all is done. Do not write there."""
    file = write_suite(tmp_path_factory.mktemp("suite"), small_dataset, epochs=1, suite=SUITE)
    run_all(plan_suite(file))
    return file


@pytest.fixture
def plan(done: Path, tmp_path: Path) -> Plan:
    """The same suite, with copies of its runs."""
    return plan_suite(done, str(shutil.copytree(done.parent / "runs", tmp_path / "runs", symlinks=True)))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    read, write = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    content = read(file.read_text())
    change(content)
    file.write_text(write(content))


def text_of(plan: Plan) -> str:
    out = plan.run_dir / "tables"
    write_outcome(plan, out, "dpt-hpc suite suite.yaml --tables")
    return (out / "tables.md").read_text()


def cell_of(plan: Plan, cell: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((plan.run_dir / "tables" / "cells" / f"{cell}.json").read_text())
    return found


def shown(text: str, label: str) -> str:
    """The cell of the only column, in the row of that label."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return line.split(" | ")[2]


def test_runs_as_planned_are_results_with_their_settings_and_the_plans_command(plan: Plan) -> None:
    text = text_of(plan)
    assert "no result:" not in text
    assert "±" in shown(text, "baseline")
    assert "±" in shown(text, LABEL)
    pretraining = plan.cells[1].start.cell
    assert pretraining is not None
    assert f"pre-trained on 24 structures of small, 1 epoch: `{pretraining.command}`" in text
    assert "\n    dpt-hpc suite suite.yaml --tables\n" in text
    assert "Differs from the paper in pre-training: data.split.test=0.25 (the paper: 0.15)" in text
    assert "training.batch_size=5 (the paper: 50)" in text
    cell = cell_of(plan, TUNED)
    assert (cell["config"]["training"]["batch_size"], cell["config"]["data"]["path"]) == (5, ["small"])
    assert cell["command"] == plan.cells[1].command
    assert run_all(plan) == []


def test_a_pretrained_run_is_no_baseline(plan: Plan) -> None:
    tuned = json.loads((plan.run_dir / TUNED / "seed_1" / "run.json").read_text())
    edit(plan.run_dir / BASELINE / "seed_1" / "run.json", lambda run: run.update(pretrained=tuned["pretrained"]))
    text = text_of(plan)
    assert shown(text, "baseline") == "—"
    assert "no result: seed_1: the baseline begins from scratch, but it began from pre-trained weights." in text
    edit(plan.run_dir / TUNED / "seed_0" / "run.json", lambda run: run.update(pretrained=None))
    assert "no result: seed_0: began from scratch, not from the pre-training" in text_of(plan)


def test_a_run_from_other_weights_is_not_finished_and_the_tables_are_written_all_the_same(
    plan: Plan, done: Path
) -> None:
    edit(plan.run_dir / TUNED / "seed_1" / "run.json", lambda run: run["pretrained"].update(digest="0" * 64))
    text = text_of(plan)
    assert shown(text, LABEL) == "—"
    assert f"{LABEL}, jdft: no result: seed_1: began from other weights (SHA-256 000000000000) than" in text
    assert cell_of(plan, TUNED)["test_mae"].keys() == {"0", "1"}
    shutil.rmtree(plan.run_dir / "tables")
    result = CliRunner().invoke(app, ["suite", str(done), "--run-dir", str(plan.run_dir)])
    assert isinstance(result.exception, CellsFailed)
    assert "1 of the suite's runs failed" in str(result.exception)
    assert "Delete that directory to have it run again" in result.output
    assert (plan.run_dir / "tables" / "tables.md").exists()
    shutil.rmtree(plan.run_dir / TUNED / "seed_1")
    assert [line.split("runs/")[1] for line in run_all(plan)] == [f"{TUNED}/seed_1: begins"]
    assert "no result:" not in text_of(plan)


def test_weights_that_an_early_version_did_not_record_are_told(plan: Plan) -> None:
    def forget(run: dict[str, Any]) -> None:
        run["pretrained_from"] = run.pop("pretrained")["checkpoint"]

    edit(plan.run_dir / TUNED / "seed_0" / "run.json", forget)
    text = text_of(plan)
    assert "±" in shown(text, LABEL)
    assert "jdft: which weights it began from was not recorded" in text


def test_a_row_says_what_its_pretraining_was_not_what_it_is_configured_to_be(plan: Plan) -> None:
    pretraining = plan.run_dir / PRETRAINED
    edit(pretraining / "run.json", lambda run: run["dataset"][0].update(path="/somewhere/other", structures=99))
    edit(pretraining / "run.json", lambda run: run["split"].update(train=70))
    edit(pretraining / "results.json", lambda results: results.update(epochs=3))
    edit(pretraining / "config.yaml", lambda config: config["training"].update(epochs=3))
    text = text_of(plan)
    assert f"- {LABEL}: pre-trained on 70 structures of other, 3 epochs\n" in text  # no command: it made another one
    assert "pre-trained with other options than configured: training.epochs: was 3, now 1" in text
    assert "pre-trained on other data than configured" in text


def test_seeds_and_rows_that_do_not_agree_are_no_result(plan: Plan) -> None:
    seed = plan.run_dir / TUNED / "seed_1"
    edit(seed / "config.yaml", lambda config: config["training"].update(batch_size=9))
    text = text_of(plan)
    assert shown(text, LABEL) == "—"
    assert "jdft: no result: its seeds have different options: seeds 0 | 1" in text
    edit(seed / "run.json", lambda run: run["dataset"][0].update(digest="x"))
    assert "jdft: no result: its seeds have different datasets: seeds 0 | 1" in text_of(plan)
    edit(seed / "config.yaml", lambda config: config["training"].update(batch_size=5))
    edit(plan.run_dir / TUNED / "seed_0" / "run.json", lambda run: run["dataset"][0].update(digest="x"))
    text = text_of(plan)
    assert "jdft: no result: its data or their split are not those of the rows above" in text
    assert "±" in shown(text, "baseline")


def as_the_paper(plan: Plan) -> None:
    """Let the baseline's records be those of the paper's set and protocol."""
    cell = plan.run_dir / BASELINE
    sizes = {key.removeprefix("model."): value for key, value in SIZES["cgcnn"].items()}
    edit(cell / "results.json", lambda results: results.update(unit="meV/atom"))
    for seed in ("seed_0", "seed_1"):
        edit(cell / seed / "run.json", lambda run: run["dataset"][0].update(structures=636))
        edit(cell / seed / "results.json", lambda results: results.update(epochs=200))
        edit(cell / seed / "config.yaml", lambda config: config["training"].update(epochs=200))
        edit(
            cell / seed / "config.yaml",
            lambda config: config["data"]["split"].update(train=0.6, validation=0.2, test=0.2),
        )
        edit(cell / seed / "config.yaml", lambda config: config["model"].update(sizes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"split": {"by": "group"}}}, "a split of 0.6/0.2/0.2 by group"),
        ({"data": {"split": {"train": 0.5, "test": 0.3}}}, "a split of 0.5/0.2/0.3 by structure"),
        ({"data": {"split": {"train_fraction": 0.1}}}, "0.1 of the training part"),
        ({"data": {"exclude": "leaks.json"}}, "structures are excluded"),
        ({"objective": {"normalise": True}}, "a recipe of our own (objective.normalise)"),
        ({"transfer": {"layer_decay": 0.8}}, "a recipe of our own (transfer.layer_decay)"),
        ({"training": {"early_stopping": 10}}, "a recipe of our own (training.early_stopping)"),
        ({"model": {"envelope": "gate", "hidden": 16}}, "a recipe of our own (model.hidden, model.envelope)"),
    ],
)
def test_the_papers_number_stands_beside_its_own_protocol_alone(plan: Plan, change: dict[str, Any], said: str) -> None:
    as_the_paper(plan)
    assert "[62.6]" in shown(text_of(plan), "baseline")

    def merge(config: dict[str, Any], change: dict[str, Any] = change) -> None:
        for key, value in change.items():
            merge(config[key], value) if isinstance(value, dict) else config.update({key: value})

    for seed in ("seed_0", "seed_1"):
        edit(plan.run_dir / BASELINE / seed / "config.yaml", merge)
    text = text_of(plan)
    assert "[62.6]" not in shown(text, "baseline")
    assert f"jdft: the paper's number does not stand beside it: {said}" in text


def test_a_short_finetuning_has_no_number_of_the_paper(plan: Plan) -> None:
    as_the_paper(plan)
    edit(plan.run_dir / BASELINE / "seed_0" / "results.json", lambda results: results.update(epochs=1))
    assert "the paper's number does not stand beside it: 1 epoch" in text_of(plan)


def test_shared_structures_are_counted_in_the_tables(plan: Plan) -> None:
    assert "Not checked for structures that a pre-training has seen: there is no leaks.json." in text_of(plan)
    held, tested = (cell_of(plan, cell)["dataset"][0] for cell in (PRETRAINED, TUNED))
    found = {"dataset": "data/jdft", "digest": tested["digest"], "structures": 1048, "matches": [{}, {}, {}]}
    other = {"dataset": "data/other", "digest": "y", "structures": 3, "matches": []}
    told: dict[str, Any] = {"pretraining": {"dataset": "data/pretrain", "digest": held["digest"]}}
    files = [plan.run_dir / name for name in ("leaks.json", "more.json")]
    shared = f"tructures that the pre-training set {held['name']} has, too"
    files[0].write_text(json.dumps(told | {"downstream": [other]}))
    assert f"Not checked for s{shared}: {tested['name']}, in " in text_of(replace(plan, leaks=(files[0],)))
    files[1].write_text(json.dumps(told | {"downstream": [found]}))
    text = text_of(replace(plan, leaks=tuple(files)))
    assert f"S{shared}, and that were not taken out: {tested['name']} 3 of 1,048." in text
    assert "Not checked" not in text
    edit(plan.run_dir / PRETRAINED / "config.yaml", lambda config: config["data"].update(exclude=["x/bad.json"]))
    text = text_of(replace(plan, leaks=tuple(files)))
    assert f"S{shared} (data.exclude left out what bad.json names): {tested['name']} 3 of 1,048." in text
    files[1].write_text(json.dumps(told | {"pretraining": {"dataset": "data/other", "digest": "y"}, "downstream": []}))
    assert f"Not checked for s{shared}: {tested['name']}, in " in text_of(replace(plan, leaks=tuple(files)))

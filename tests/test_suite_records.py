"""A suite goes on from its records: what was run elsewhere counts, and its weights are begun from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_suite import run_all, write_suite
from test_suite_adoption import edit

from dpt_hpc.errors import DataError
from dpt_hpc.suite.outcome import write_outcome
from dpt_hpc.suite.plan import Plan, plan_suite
from dpt_hpc.suite.status import describe
from dpt_hpc.train.checkpoint import load_weights, weights_digest

SUITE: dict[str, Any] = {
    "records": "records",
    "networks": {
        "cgcnn": {
            "pretrainings": {
                "forces": {"config": "pretrain.yaml", "set": {"checkpoint": {"keep_every_epochs": 1}}},
                "short": {"of": "forces", "epochs": 1},
            },
            "datasets": {"jdft": {"config": "finetune.yaml"}},
        }
    },
    "cells": [{"network": "cgcnn", "pretrainings": ["baseline", "forces", "short"]}],
}
ROOT = Path(__file__).parents[1]
RECORDS = "benchmarks/results/paper"
BASELINE, TUNED, SHORT = (f"cgcnn/add/{name}/jdft" for name in ("baseline", "forces", "short"))
PRETRAINED = "cgcnn/pretrain/forces"
WEIGHTS = ("forces.safetensors", "forces_first_1.safetensors")


@pytest.fixture(scope="module")
def done(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a suite of which all is done and recorded. Do not write there."""
    folder = tmp_path_factory.mktemp("suite")
    plan = plan_suite(write_suite(folder, small_dataset, epochs=2, suite=SUITE))
    run_all(plan)
    record(plan)
    return folder


@pytest.fixture
def plan(done: Path, tmp_path: Path) -> Plan:
    """The same suite, with copies of its runs and records."""
    folder = shutil.copytree(done, tmp_path / "suite", symlinks=True)
    return plan_suite(folder / "suite.yaml", str(folder / "runs"))


def record(plan: Plan) -> str:
    assert plan.records is not None
    write_outcome(plan, plan.records, "dpt-hpc suite suite.yaml --tables")
    return (plan.records / "tables.md").read_text()


def file_of(plan: Plan, cell: str) -> Path:
    assert plan.records is not None
    return plan.records / "cells" / f"{cell}.json"


def begun(plan: Plan) -> list[str]:
    return [line.split("runs/")[1] for line in run_all(plan)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_tables_and_records_are_the_same_when_the_runs_are_gone(plan: Plan) -> None:
    assert plan.records is not None
    record(plan)  # with this plan's run_dir in its commands
    before = contents(plan.records)
    assert {name for name in before if name.startswith("weights")} == {f"weights/cgcnn/{name}" for name in WEIGHTS}
    shutil.rmtree(plan.run_dir)
    assert [line.split()[0] for line in describe(plan)[:4]] == ["recorded"] * 4
    assert describe(plan)[4] == "0 done, 7 recorded, 0 running, 0 begun, 0 missing of 7 runs"
    assert run_all(plan) == []
    record(plan)
    assert contents(plan.records) == before
    write_outcome(plan, plan.run_dir / "tables", "dpt-hpc suite suite.yaml --tables")
    assert contents(plan.run_dir / "tables").keys() == {name for name in before if not name.startswith("weights")}


def test_recorded_weights_are_begun_from_bit_for_bit(plan: Plan, done: Path) -> None:
    assert plan.records is not None
    shutil.rmtree(plan.run_dir)
    for cell in (TUNED, SHORT):
        file_of(plan, cell).unlink()
    assert begun(plan) == [f"{cell}/seed_{seed}: begins" for cell in (TUNED, SHORT) for seed in (0, 1)]
    for cell, kept in zip((TUNED, SHORT), WEIGHTS, strict=True):
        again, once = (folder / cell / "seed_1" for folder in (plan.run_dir, done / "runs"))
        for name, weight in load_weights(once).items():
            assert torch.equal(load_weights(again)[name], weight), name
        now, before = (json.loads((run / "run.json").read_text()) for run in (again, once))
        assert now["pretrained"]["digest"] == before["pretrained"]["digest"]
        assert f"{kept}" in now["command"]
    assert "no result:" not in record(plan)
    assert run_all(plan) == []


def test_weights_have_one_digest_as_a_checkpoint_and_as_an_exported_file(done: Path) -> None:
    run = done / "runs" / PRETRAINED
    digest = hashlib.sha256((run / "checkpoints" / "best" / "model.safetensors").read_bytes()).hexdigest()
    kept = done / "records" / "weights" / "cgcnn" / WEIGHTS[0]
    assert weights_digest(run) == weights_digest(kept) == digest
    told = json.loads((done / "records" / "cells" / f"{PRETRAINED}.json").read_text())
    assert told["weights_sha256"] == digest


def test_seeds_of_runs_and_of_records_are_joined(plan: Plan) -> None:
    text = record(plan)
    whole = json.loads(file_of(plan, TUNED).read_text())
    edit(file_of(plan, TUNED), lambda told: [told[key].pop("1") for key in ("test_mae", "best_epoch")])
    edit(file_of(plan, TUNED), lambda told: told["wall_seconds"].pop())
    shutil.rmtree(plan.run_dir / TUNED / "seed_0")
    assert describe(plan)[2].startswith("done, 1 recorded")
    assert record(plan) == text
    assert json.loads(file_of(plan, TUNED).read_text()) == whole
    shutil.rmtree(plan.run_dir / PRETRAINED)
    assert run_all(plan) == []


def test_weights_that_were_not_kept_do_not_stop_the_tables(plan: Plan) -> None:
    assert plan.records is not None
    shutil.rmtree(plan.records / "weights")
    shutil.rmtree(plan.run_dir / PRETRAINED / "checkpoints")
    assert "began from weights that cannot be compared" in record(plan)
    assert not (plan.records / "weights").exists()


def test_a_finetuning_goes_on_from_the_recorded_weights_of_a_pretraining_that_is_gone(plan: Plan) -> None:
    shutil.rmtree(plan.run_dir / PRETRAINED)
    shutil.rmtree(plan.run_dir / TUNED / "seed_1")
    file_of(plan, TUNED).unlink()
    assert begun(plan) == [f"{TUNED}/seed_1: begins"]
    assert "no result:" not in record(plan)


def test_a_pretraining_that_is_recorded_without_its_weights_runs_again_where_it_is_needed(plan: Plan) -> None:
    assert plan.records is not None
    shutil.rmtree(plan.run_dir)
    shutil.rmtree(plan.records / "weights")
    assert run_all(plan) == []
    file_of(plan, SHORT).unlink()
    assert "recorded without its weights: it runs again" in "\n".join(describe(plan))
    assert begun(plan) == [f"{PRETRAINED}: begins", f"{SHORT}/seed_0: begins", f"{SHORT}/seed_1: begins"]
    assert "is not used" not in record(plan)  # trained again it has the same weights


@pytest.mark.parametrize(
    ("cell", "change", "why"),
    [
        (TUNED, {"config": {"training": {"batch_size": 9}}}, "training.batch_size: was 9, now 5"),
        (TUNED, {"pretrained_sha256": "0" * 64}, "it began from other weights (SHA-256 000000000000) than those of"),
        (TUNED, {"pretrained_sha256": None}, "it began from scratch"),
        (BASELINE, {"pretrained_sha256": "0" * 64}, "it began from pre-trained weights"),
        (TUNED, {"faults": ["its seeds differ"]}, "its seeds differ"),
    ],
)
def test_a_record_that_is_no_result_of_its_cell_is_told_and_the_cell_runs(
    cell: str, change: dict[str, Any], why: str, plan: Plan
) -> None:
    shutil.rmtree(plan.run_dir)
    edit(file_of(plan, cell), lambda told: merge(told, change))
    text = record(plan)
    assert f", jdft: its record of the seeds 0, 1 is not used: {why}" in text
    assert "is not used" in "\n".join(describe(plan))
    assert begun(plan) == [f"{cell}/seed_0: begins", f"{cell}/seed_1: begins"]
    record(plan)
    assert "is not used" not in record(plan)  # what was run is the record now


def test_what_was_run_here_stands_before_a_record_of_other_data(plan: Plan) -> None:
    shutil.rmtree(plan.run_dir / TUNED / "seed_0")
    edit(file_of(plan, TUNED), lambda told: told["dataset"][0].update(digest="x"))
    text = record(plan)
    assert "not used: it is of other data than the seeds that were run here" in text
    assert json.loads(file_of(plan, TUNED).read_text())["test_mae"].keys() == {"1"}


def test_a_pretrainings_record_of_other_options_is_told_and_it_runs(plan: Plan) -> None:
    shutil.rmtree(plan.run_dir)
    edit(file_of(plan, PRETRAINED), lambda told: told["config"].update(seed=5))
    assert "its record is not used: seed: was 5, now 7" in record(plan)
    assert begun(plan) == [f"{PRETRAINED}: begins"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda told: told["test_mae"].update({"1": "low"}), r"test_mae\.1: Input should be a valid number"),
        (lambda told: told.pop("epochs"), r"epochs: Field required"),
        (lambda told: told.update(mean=1.0), r"mean: Extra inputs are not permitted"),
        (lambda told: told.update(network="schnet"), r"network: is 'schnet', but the file is in the place of 'cgcnn'"),
    ],
)
def test_a_broken_record_is_refused_with_file_and_field(
    change: Callable[[Any], object], fault: str, plan: Plan
) -> None:
    edit(file_of(plan, TUNED), change)
    with pytest.raises(DataError, match=rf"forces/jdft\.json: broken record of a suite: {fault}.*\n.*delete it"):
        describe(plan)


def test_weights_other_than_the_record_tells_of_are_refused(plan: Plan) -> None:
    shutil.rmtree(plan.run_dir)
    edit(file_of(plan, PRETRAINED), lambda told: told.update(weights_sha256="0" * 64))
    file_of(plan, TUNED).unlink()
    with pytest.raises(
        DataError, match=r"forces\.safetensors: not the weights .* tells of \(000000000000\)\.\nRestore"
    ):
        run_all(plan)


@pytest.mark.parametrize("name", ["paper", *sorted(p.parent.name for p in (ROOT / RECORDS).glob("*/tables.md"))])
def test_the_committed_tables_are_those_of_the_committed_records(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("configs", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)  # no runs and no data there
    plan = plan_suite(f"configs/suite/{name}.yaml")
    out = Path(RECORDS, *([] if name == "paper" else [name]))
    committed = {file.name: file.read_text() for file in out.glob("tables.*")}
    write_outcome(plan, out, f"dpt-hpc suite configs/suite/{name}.yaml --tables")
    for file, text in committed.items():
        assert (out / file).read_text() == text, file


def merge(content: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        merge(content[key], value) if isinstance(value, dict) else content.update({key: value})

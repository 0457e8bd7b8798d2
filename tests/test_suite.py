"""The suite: any number of workers, every run once, from wherever a lost one stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import Options, small_options

from dpt_hpc.errors import ConfigError
from dpt_hpc.quickstart import configs
from dpt_hpc.suite.config import load_suite
from dpt_hpc.suite.outcome import write_outcome
from dpt_hpc.suite.plan import Plan, plan_suite
from dpt_hpc.suite.status import describe
from dpt_hpc.suite.work import CellsFailed, alone, work
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.pretrained import find_pretrained
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.run import finished_to

NETWORK = {
    "pretrainings": {"forces": {"config": "pretrain.yaml"}},
    "datasets": {"small": {"config": "finetune.yaml"}},
}
SUITE: dict[str, Any] = {
    "networks": {"cgcnn": NETWORK},
    "cells": [{"network": "cgcnn", "pretrainings": ["baseline", "forces"]}],
}


def write_suite(
    folder: Path, dataset: Path, epochs: int, suite: Mapping[str, Any] = SUITE, seeds: Sequence[int] = (0, 1)
) -> Path:
    """A suite of a pre-training and two fine-tunings of two seeds each, with small networks."""
    options = small_options(dataset)
    options["training"]["epochs"] = epochs
    (folder / "pretrain.yaml").write_text(yaml.safe_dump({**options, "run_dir": "x", "task": "pretrain"}))
    del options["seed"]
    options |= {"run_dir": "x", "task": "finetune", "seeds": list(seeds)}
    options["objective"] = {"kind": "property", "target": "volume_per_atom"}
    (folder / "finetune.yaml").write_text(yaml.safe_dump(options))
    (folder / "suite.yaml").write_text(yaml.safe_dump({"run_dir": str(folder / "runs"), **suite}))
    return folder / "suite.yaml"


def run_all(plan: Plan) -> list[str]:
    """What a worker says of its cells."""
    said: list[str] = []
    work(plan, Ranks(), said.append, quiet=True)
    return said


def facts(plan: Plan) -> dict[str, dict[str, Any]]:
    """run.json of every run, by its place in the run directory."""
    found = plan.run_dir.rglob("run.json")
    return {str(p.parent.relative_to(plan.run_dir)): json.loads(p.read_text()) for p in found}


RUNS = {
    "cgcnn/add/baseline/small/seed_0", "cgcnn/add/baseline/small/seed_1", "cgcnn/pretrain/forces",
    "cgcnn/add/forces/small/seed_0", "cgcnn/add/forces/small/seed_1",
}  # fmt: skip


def test_plain_runs_are_adopted_and_tables_are_of_what_is_there(small_dataset: Path, tmp_path: Path) -> None:
    plan = plan_suite(write_suite(tmp_path, small_dataset, epochs=1))
    baseline, tuned = plan.cells
    finetune(baseline.config, Ranks(), quiet=True)
    assert describe(plan)[0].split() == ["done", str(baseline.path)]
    assert describe(plan)[-2] == "2 done, 0 running, 0 begun, 3 missing of 5 runs"
    write_outcome(plan, tmp_path / "early", "dpt-hpc suite suite.yaml --tables")
    assert "| forces 1 : 500 : 500, 1 epoch | — | — | — |" in (tmp_path / "early" / "tables.md").read_text()
    before = facts(plan)
    said = run_all(plan)
    assert [line.split("runs/")[1] for line in said] == [
        "cgcnn/pretrain/forces: begins",
        "cgcnn/add/forces/small/seed_0: begins",
        "cgcnn/add/forces/small/seed_1: begins",
    ]
    after = facts(plan)
    assert set(after) == RUNS
    assert all(after[run] == found for run, found in before.items())
    assert after["cgcnn/add/forces/small/seed_1"]["command"] == tuned.command
    assert tuned.command.startswith("dpt-hpc finetune ")
    assert f"--set pretrained={plan.run_dir}/cgcnn/pretrain/forces" in tuned.command
    summary = json.loads((tuned.path / "results.json").read_text())
    write_outcome(plan, tmp_path / "tables", "dpt-hpc suite suite.yaml --tables")
    cell = json.loads((tmp_path / "tables" / "cells" / "cgcnn" / "add" / "forces" / "small.json").read_text())
    assert list(cell["test_mae"].values()) == summary["test_mae"]
    assert (cell["unit"], cell["other_options"], cell["split"]["train"]) == ("A^3", [], 24)
    text = (tmp_path / "tables" / "tables.md").read_text()
    assert "| forces 1 : 500 : 500, 1 epoch | 24 |" in text
    assert run_all(plan) == []  # nothing is left
    assert "no result:" not in text
    longer = plan_suite(write_suite(tmp_path, small_dataset, epochs=2)).cells[1].start.cell
    assert longer is not None
    pretrain(longer.config, Ranks(), quiet=True, resume=True)
    write_outcome(plan, tmp_path / "tables", "dpt-hpc suite suite.yaml --tables")
    text = (tmp_path / "tables" / "tables.md").read_text()
    assert "small: no result: seed_1: began from other weights (SHA-256 " in text
    assert "| forces 1 : 500 : 500, 1 epoch | 24 | — | — |" in text
    assert ", 2 epochs" in text  # as long as the pre-training was, not as it is configured
    assert describe(plan)[2].split()[0] == "begun,"
    with pytest.raises(CellsFailed, match=r"2 of the suite's runs failed"):
        run_all(plan)


def test_a_cell_that_fails_does_not_stop_the_others(small_dataset: Path, tmp_path: Path) -> None:
    suite = {"networks": {"cgcnn": {**NETWORK, "set_pretraining": {"data.path": str(tmp_path / "nowhere")}}}}
    plan = plan_suite(write_suite(tmp_path, small_dataset, epochs=1, suite={**SUITE, **suite}))
    with pytest.raises(CellsFailed) as caught:
        run_all(plan)
    assert "3 of the suite's runs failed; all others are done." in str(caught.value)
    assert "forces/small/seed_1: its pre-training" in str(caught.value)
    assert set(facts(plan)) == {"cgcnn/add/baseline/small/seed_0", "cgcnn/add/baseline/small/seed_1"}


def test_results_of_an_early_version_are_as_long_as_their_config(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    early = Path(shutil.copytree(finished[1], tmp_path / "early", symlinks=True))
    results = json.loads((early / "results.json").read_text())
    assert results.pop("epochs") == 3
    (early / "results.json").write_text(json.dumps(results))
    assert [finished_to(early, epochs) for epochs in (3, 4)] == [True, False]


def test_runs_made_with_other_options_are_named(small_dataset: Path, tmp_path: Path) -> None:
    path = write_suite(tmp_path, small_dataset, epochs=1)
    pretraining = plan_suite(path).cells[1].start.cell
    assert pretraining is not None
    other = pretraining.config.model_copy(update={"seed": 5})
    pretrain(other, Ranks(), quiet=True)
    write_outcome(plan_suite(path), tmp_path / "tables", "dpt-hpc suite suite.yaml --tables")
    text = (tmp_path / "tables" / "tables.md").read_text()
    assert "forces 1 : 500 : 500, 1 epoch: pre-trained with other options than configured: seed: was 5, now 7" in text


def test_the_first_epochs_of_one_run_make_rows_and_a_figure(small_dataset: Path, tmp_path: Path) -> None:
    pretrainings = {
        "long": {"config": "pretrain.yaml", "set": {"checkpoint": {"keep_every_epochs": 1}}},
        "short": {"of": "long", "epochs": 1},
    }
    suite = {
        "networks": {
            "cgcnn": {**NETWORK, "pretrainings": pretrainings, "set_finetuning": {"transfer.freeze": ["embedding"]}}
        },
        "cells": [{"network": "cgcnn", "pretrainings": ["baseline", "short", "long"]}],
        "figures": {"epochs": {"x": "epochs", "network": "cgcnn", "lines": {"a": ["short", "long"]}}},
    }
    plan = plan_suite(write_suite(tmp_path, small_dataset, epochs=2, suite=suite, seeds=[0]))
    assert [bool(cell.config.transfer.freeze) for cell in plan.cells] == [False, True, True]
    run_all(plan)
    found = facts(plan)
    starts = {name: found[f"cgcnn/add/{name}/small/seed_0"]["pretrained"]["checkpoint"] for name in ("short", "long")}
    assert starts == {"short": str(find_pretrained(f"{plan.run_dir}/cgcnn/pretrain/long", 1)), "long": starts["long"]}
    out = tmp_path / "tables"
    assert out / "epochs.png" in write_outcome(plan, out, "dpt-hpc suite suite.yaml --tables")
    table = (out / "tables.md").read_text()
    assert "| forces 1 : 500 : 500, first 1 epoch | 24 |" in table
    assert "| forces 1 : 500 : 500, 2 epochs | 24 |" in table


def test_a_recipe_is_compared_with_another_networks_baseline(small_dataset: Path, tmp_path: Path) -> None:
    recipe = {
        **NETWORK,
        "set_finetuning": {"training.ema_decay": 0.9},
        "pretrainings": {"forces": {"of": "cgcnn/forces"}},
        "against": {"network": "cgcnn"},
    }
    suite = {
        "networks": {"cgcnn": NETWORK, "averaged": recipe},
        "cells": [{"network": "cgcnn"}, {"network": "averaged", "pooling": ["mean"], "pretrainings": ["forces"]}],
    }
    plan = plan_suite(write_suite(tmp_path, small_dataset, epochs=1, suite=suite, seeds=[0]))
    run_all(plan)
    assert not (plan.run_dir / "averaged" / "pretrain").exists()
    write_outcome(plan, tmp_path / "tables", "dpt-hpc suite suite.yaml --tables")
    _, table = json.loads((tmp_path / "tables" / "tables.json").read_text())
    assert [row["label"] for row in table["rows"]] == [
        "baseline: cgcnn, add pooling, not pre-trained",
        "forces 1 : 500 : 500, 1 epoch",
    ]
    base, ours = (row["results"]["small"]["test_mae"]["0"] for row in table["rows"])
    assert table["rows"][1]["average_improvement"]["percent"] == pytest.approx(100 * (base - ours) / base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"networks": {"cgcnn": {**NETWORK, "against": {"network": "x"}}}},
            r"networks\.cgcnn\.against\.network: there is no 'x'",
        ),
        (
            {
                "networks": {"cgcnn": {**NETWORK, "against": {"network": "cgcnn", "pooling": "mean"}}},
            },
            r"networks\.cgcnn\.against: no cells of cgcnn with mean pooling are a baseline; add baseline to them",
        ),
        ({"cell": []}, r"cell: unknown option; did you mean cells\?"),
        (
            {"networks": {"cgcnn": {**NETWORK, "dataset": {}}}},
            r"networks\.cgcnn\.dataset: unknown option; did you mean",
        ),
        (
            {"networks": {"cgcnn": {"datasets": {"a": {"config": "finetune.yaml", "sets": {}}}}}},
            r"networks\.cgcnn\.datasets\.a\.sets: unknown option; did you mean networks\.cgcnn\.datasets\.a\.set\?",
        ),
        ({"cells": [{"network": "cgcn"}]}, r"cells\.0\.network: there is no 'cgcn'; expected one of cgcnn"),
        ({"cells": [{"network": "cgcnn", "datasets": ["big"]}]}, r"cells\.0\.datasets: there is no 'big'"),
        (
            {"cells": [{"network": "cgcnn", "pretrainings": ["f"]}]},
            r"there is no 'f'; expected one of baseline, forces",
        ),
        ({"networks": {"a/b": NETWORK}}, r"'a/b' names a directory: letters, digits"),
        (
            {"networks": {"cgcnn": {**NETWORK, "pretrainings": {"forces": {"of": "x", "epochs": 3}}}}},
            r"cgcnn\.pretrainings\.forces\.of is 'x', which runs nothing",
        ),
        (
            {"networks": {"cgcnn": {**NETWORK, "pretrainings": {"forces": {"set": {}}}}}},
            r"networks\.cgcnn\.pretrainings\.forces: give either config \(a file to run\) or of",
        ),
    ],
)
def test_what_is_wrong_with_a_suite_is_named(
    change: dict[str, Any], message: str, small_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_suite(write_suite(tmp_path, small_dataset, epochs=1, suite={**SUITE, **change}))


def test_what_is_wrong_with_a_config_of_a_suite_is_named_before_anything_runs(
    small_dataset: Path, tmp_path: Path
) -> None:
    suite = {"networks": {"cgcnn": {**NETWORK, "set": {"training.epoch": 3}}}}
    with pytest.raises(ConfigError, match=r"training\.epoch: unknown option; did you mean training\.epochs\?"):
        plan_suite(write_suite(tmp_path, small_dataset, epochs=1, suite={**SUITE, **suite}))


@pytest.mark.parametrize("path", sorted((configs() / "suite").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_suites_that_come_with_it_are_valid(path: Path) -> None:
    plan = plan_suite(path)
    assert len({cell.path for cell in plan.order}) == len(plan.order)


def test_parts_of_the_data_are_compared_after_equal_steps_too() -> None:
    plan = plan_suite(configs() / "suite" / "scale.yaml")
    starts = plan.starts["cgcnn"]
    for name in plan.figures["scale"].lines["DFT, equal steps"]:
        cell = starts[name].cell
        assert cell is not None
        assert cell.config.data.split.train_fraction * cell.config.training.epochs == 100, name


@pytest.mark.slow
def test_two_workers_share_the_cells_and_take_up_that_of_a_killed_one(small_dataset: Path, tmp_path: Path) -> None:
    path = write_suite(tmp_path, small_dataset, epochs=8)
    plan = plan_suite(path)
    command = [sys.executable, "-m", "dpt_hpc", "suite", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    lost = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    first = plan.cells[0].path / "seed_0"
    while not (first / "checkpoints" / "last").exists():
        assert lost.poll() is None
        time.sleep(0.02)
    lost.send_signal(signal.SIGKILL)
    lost.wait()
    assert not (first / "results.json").exists()
    # As a rank of srun: it is a worker of its own, whatever the size of its step.
    rank = environment | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    command[2] = "dpt_hpc.launch"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=rank) as other:
        while "== " not in (line := other.stdout.readline()):  # type: ignore[union-attr]
            assert other.poll() is None
        mine: list[str] = []
        work(plan, alone(), mine.append, quiet=True)
        told = line + other.stdout.read()  # type: ignore[union-attr]
        assert other.wait() == 0
    theirs = [line for line in told.splitlines() if line.startswith("== ")]
    runs = [line.split("runs/")[1].split(":")[0] for line in (*mine, *theirs)]
    assert sorted(runs) == sorted(RUNS)  # every run once, by one of them
    assert mine
    assert f"== {first}: goes on" in theirs
    found = facts(plan)
    assert {facts["world_size"] for facts in found.values()} == {1}
    assert [run for run in RUNS if "resumed" in found[run]] == ["cgcnn/add/baseline/small/seed_0"]
    assert all(len(json.loads((cell.path / "results.json").read_text())["test_mae"]) == 2 for cell in plan.cells)
    assert (plan.run_dir / "tables" / "tables.md").exists()

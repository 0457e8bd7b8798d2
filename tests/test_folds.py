"""Matbench's official folds: tested as published, validated by the seed, refused where the dataset is another one."""

from __future__ import annotations

import gzip
import hashlib
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import Options, config_of, finetune_options

from dpt_hpc.data.folds import check_order
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.train.checkpoint import load_card
from dpt_hpc.train.config import PropertyOptions, SplitOptions
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.parts import make_split
from dpt_hpc.train.ranks import Ranks

TARGET = PropertyOptions(target="volume_per_atom")


def folds_of(task: str, count: int) -> dict[str, Any]:
    """Five folds of `count` rows: every fifth row is tested, from the fold's number on."""
    names = [f"mb-{task}-{row + 1:03}" for row in range(count)]
    return {
        f"fold_{k}": {"train": [n for i, n in enumerate(names) if i % 5 != k], "test": names[k::5]} for k in range(5)
    }


@pytest.fixture(scope="module")
def rows(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small dataset with ids that count its rows, as Matbench's are ingested."""
    dataset, out = Dataset.open(small_dataset), tmp_path_factory.mktemp("folds") / "rows"
    structures = [replace(dataset.get(i), structure_id=str(i)) for i in range(len(dataset))]
    write_dataset(structures, out, provenance={}, property_units={"volume_per_atom": "A^3"})
    return out


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Folds of a task as large as the small dataset, and of a larger one."""
    path = tmp_path / "folds.json.gz"
    content = {"matbench_small": folds_of("small", 48), "matbench_large": folds_of("large", 50)}
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def options_of(file: Path, **changes: Any) -> SplitOptions:
    return SplitOptions(
        **{"train": 0.6, "validation": 0.2, "test": 0.2, "by": "structure", "matbench": str(file), **changes}
    )


def test_folds_are_tested_as_published(rows: Path, file: Path) -> None:
    dataset = Dataset.open(rows)
    tested = []
    for fold in range(5):
        split = make_split(dataset, options_of(file), TARGET, fold)
        assert split.test.tolist() == list(range(fold, 48, 5))
        assert len(split.validation) == pytest.approx(0.25 * (48 - len(split.test)), abs=0.5)
        parts = [split.train, split.validation, split.test]
        assert sorted(np.concatenate(parts).tolist()) == list(range(48))
        tested += split.test.tolist()
    assert sorted(tested) == list(range(48))
    first, other = (make_split(dataset, options_of(file, seed=seed), TARGET, 0) for seed in (1, 2))
    assert first.test.tolist() == other.test.tolist()
    assert first.validation.tolist() != other.validation.tolist()


def test_a_fine_tuning_reports_the_mean_over_the_folds(
    finished: tuple[Options, Path], rows: Path, file: Path, tmp_path: Path
) -> None:
    options = deepcopy(finished[0])
    options["data"]["path"] = str(rows)
    options["data"]["split"]["matbench"] = str(file)
    summary = finetune(finetune_options(options, tmp_path / "fine"), Ranks(), quiet=True)
    errors = [json.loads((tmp_path / "fine" / f"seed_{k}" / "results.json").read_text()) for k in (0, 1)]
    assert summary["mean"] == pytest.approx(np.mean([e["test"]["target_mae"] for e in errors]))
    run = json.loads((tmp_path / "fine" / "seed_1" / "run.json").read_text())
    assert run["split"]["test"] == len(range(1, 48, 5))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    folds = {"path": str(file), "task": "matbench_small", "fold": 1, "digest": digest}
    card = load_card(tmp_path / "fine" / "seed_1" / "checkpoints" / "best")
    assert run["folds"] == card.trained_on["folds"] == folds
    assert card.trained_on["split"]["by"] == "matbench"
    assert str(tmp_path) not in card.shareable().text()
    content = json.loads(gzip.decompress(file.read_bytes()))
    for fold in content["matbench_small"].values():
        fold["train"], fold["test"] = fold["train"][9:] + fold["test"], fold["train"][:9]
    file.write_text(json.dumps(content))
    longer = finetune_options(options, tmp_path / "fine")
    longer = longer.model_copy(update={"training": longer.training.model_copy(update={"epochs": 2})})
    with pytest.raises(ConfigError, match=r"its folds has changed since it began: was .*matbench_small.*\nRestore it"):
        finetune(longer, Ranks(), resume=True, quiet=True)
    with pytest.raises(ConfigError, match=r"seeds are \[0, 5\], but data\.split\.matbench makes them its folds"):
        finetune_options(options, tmp_path, seeds=[0, 5])
    with pytest.raises(ConfigError, match=r"split\.matbench is given, but the folds part Matbench's datasets for fine"):
        config_of(options, tmp_path)


def test_a_fold_that_matbench_has_not_is_refused(rows: Path, file: Path) -> None:
    """A config refuses it, too, but the seed of a job of an array is set after it was read."""
    dataset = Dataset.open(rows)
    for fold in (5, -1):
        with pytest.raises(
            DataError, match=rf"the seed is {fold}, and is the number of the fold, but there are folds 0"
        ):
            make_split(dataset, options_of(file), TARGET, fold)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"matbench_task": "matbench_large"},
            r"matbench_large has 50 structures, the dataset 48\.\nThe folds",
        ),
        ({"matbench_task": "matbench_x"}, r"matbench_task is 'matbench_x', but .* has matbench_small, matbench_large"),
        ({"matbench": "nowhere.json"}, r"data\.split\.matbench: nowhere\.json: No such file or directory"),
    ],
)
def test_another_dataset_is_refused(
    changes: dict[str, Any], message: str, rows: Path, file: Path, tmp_path: Path
) -> None:
    dataset = Dataset.open(rows)
    with pytest.raises(DataError, match=message):
        make_split(dataset, options_of(file, **changes), TARGET, 0)


def test_a_file_without_folds_of_this_dataset_is_refused(rows: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(rows)
    broken = folds_of("small", 48)
    broken["fold_0"]["test"][0] = broken["fold_0"]["test"][1]
    unknown = folds_of("small", 48)
    unknown["fold_0"]["test"][0] = "first"
    cases = {
        r"has 48 structures, as 0 of the tasks of .* have: matbench_large 50": {
            "matbench_large": folds_of("large", 50)
        },
        r"has 48 structures, as 2 of the tasks of": {"a": folds_of("a", 48), "b": folds_of("b", 48)},
        r"fold 0 of matbench_small does not hold each of its 48 rows once": {"matbench_small": broken},
        r"'first' is not an id of Matbench": {"matbench_small": unknown},
        r"not a validation file of Matbench: expected tasks with folds": {"matbench_small": [1, 2]},
    }
    for i, (message, content) in enumerate(cases.items()):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            make_split(dataset, options_of(path), TARGET, 0)


def test_an_official_test_part_loses_nothing(rows: Path, file: Path) -> None:
    dataset = Dataset.open(rows)
    learnt = make_split(dataset, options_of(file), TARGET, 0, excluded=np.array([1]))
    assert 1 not in {*learnt.train.tolist(), *learnt.validation.tolist(), *learnt.test.tolist()}
    with pytest.raises(DataError, match=r"1 structures of the test part of fold 0 have no target, or are excluded"):
        make_split(dataset, options_of(file), TARGET, 0, excluded=np.array([5]))


def test_a_dataset_in_another_order_is_refused() -> None:
    check_order([f"mb-small-{row:03}" for row in range(1, 12)])
    check_order([str(row) for row in range(12)])
    check_order([f"jdft:{row}" for row in range(12)])
    with pytest.raises(
        DataError, match=r"structure 1 of the dataset is 'Si-b', which does not say which row of Matbench"
    ):
        check_order(["0", "Si-b", "2"])
    with pytest.raises(DataError, match=r"structure 1 of the dataset is 2: not in Matbench's order"):
        check_order(["0", "2", "1"])

"""Leaks between datasets: found whatever the cell, the order of atoms or the volume; left out of a run when asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import Options, config_of, finetune_options, run
from systems import FCC, NASTY, ROCKSALT, System, supercell

from dpt_hpc.cli import run_command_line
from dpt_hpc.data.ingest.matching import Matcher
from dpt_hpc.data.ingest.pipeline import reduced_formula
from dpt_hpc.data.leaks import compositions, find_leaks, leaks_as_json, part_tested_by, read_exclusion, to_exclude
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.structure import Structure
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import Ranks

SALT = [11, 11, 11, 11, 17, 17, 17, 17]


def structure(name: str, system: System, numbers: Sequence[int]) -> Structure:
    return Structure(
        positions=system.positions,
        cell=system.cell,
        pbc=system.pbc,
        atomic_numbers=torch.tensor(numbers),
        structure_id=name,
        group=name,
        properties={"gap": 1.0},
    )


def dataset(path: Path, structures: Sequence[Structure]) -> Dataset:
    write_dataset(structures, path, provenance={}, property_units={"gap": "eV"})
    return Dataset.open(path)


def rotated(system: System, seed: int = 0) -> System:
    """The same crystal with another orientation, origin and volume (3 % longer axes)."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    matrix = torch.tensor(turn) * 1.03
    return System((system.positions + 0.37) @ matrix, system.cell @ matrix, system.pbc)


@pytest.fixture
def rocksalt() -> System:
    return supercell(ROCKSALT, 5.6, 1)


@pytest.fixture
def pretraining(tmp_path: Path, rocksalt: System) -> Dataset:
    zincblende = [*FCC, [0.25, 0.25, 0.25], [0.25, 0.75, 0.75], [0.75, 0.25, 0.75], [0.75, 0.75, 0.25]]
    doubled = supercell(ROCKSALT, 5.6, 2, rattle=0.03)
    return dataset(
        tmp_path / "pretraining",
        [
            structure("salt", rotated(rocksalt), SALT),
            structure("other polymorph", supercell(zincblende, 6.0, 1), SALT),
            structure("supercell", doubled, SALT * 8),
            structure("copper", supercell(FCC, 3.6, 1), [29] * 4),
        ],
    )


def test_compositions_are_reduced_formulas(small_dataset: Path, pretraining: Dataset) -> None:
    for found in (Dataset.open(small_dataset), pretraining):
        kinds = list(compositions(found))
        formulas = [reduced_formula(found.get(i).atomic_numbers.numpy()) for i in range(len(found))]
        assert len(kinds) == len(found)
        assert len(set(zip(kinds, formulas, strict=True))) == len(set(kinds)) == len(set(formulas))


def test_the_same_material_is_found_in_any_cell_and_no_other(
    tmp_path: Path, pretraining: Dataset, rocksalt: System
) -> None:
    downstream = dataset(
        tmp_path / "downstream",
        [
            structure("potassium salt", rocksalt, [19] * 4 + [17] * 4),
            structure("table salt", rocksalt, SALT),
            structure("swapped", rocksalt, SALT[::-1]),
        ],
    )
    seen: list[tuple[int, int]] = []
    found = find_leaks(pretraining, downstream, progress=lambda done, total: seen.append((done, total)))
    assert {m.structure_id: m.found_as for m in found.matches} == {
        "table salt": ("salt", "supercell"),
        "swapped": ("salt", "supercell"),
    }
    assert (found.checked, found.same_composition) == (3, 2)
    assert seen[-1] == (6, 6)
    by_formula = find_leaks(pretraining, downstream, by="composition")
    assert by_formula.matches[0].found_as == ("salt", "other polymorph", "supercell")
    part = find_leaks(pretraining, downstream, np.array([0, 2]))
    assert [m.structure_id for m in part.matches] == ["swapped"]
    assert part.checked == 2


@pytest.mark.parametrize(
    "name", [name for name, system in NASTY.items() if 0 < system.num_atoms < 20 and "1e7" not in name]
)
def test_nasty_cells_are_compared_with_themselves(name: str) -> None:
    one = structure("one", NASTY[name], [29] * NASTY[name].num_atoms)
    assert Matcher().same(one, replace(one, positions=one.positions + 0.01))
    if one.pbc.all():
        assert not Matcher().same(one, replace(one, pbc=torch.tensor([True, True, False])))


def test_the_command_prints_counts_and_ids_and_writes_them(
    tmp_path: Path, pretraining: Dataset, rocksalt: System, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "downstream", [structure("table salt", rocksalt, SALT)])
    places = [str(tmp_path / "pretraining"), str(tmp_path / "downstream")]
    run_command_line(["data", "leaks", *places, "--out", str(tmp_path / "leaks.json")])
    told = capsys.readouterr().out
    assert "downstream (all): 1 of 1 structures" in told
    assert "table salt: salt, supercell" in told
    assert "to leave out of the pre-training: 2 of 4 structures" in told
    assert f"--set data.exclude={tmp_path / 'leaks.json'}" in told
    content = json.loads((tmp_path / "leaks.json").read_text())
    assert content["exclude"] == ["salt", "supercell"]
    assert content["pretraining"]["digest"] == pretraining.manifests[0].digest
    assert content["tolerances"]["stol"] == 0.3
    run_command_line(["data", "leaks", *places, "--by", "composition", "--json"])
    assert json.loads(capsys.readouterr().out)["exclude"] == ["other polymorph", "salt", "supercell"]
    with pytest.raises(SystemExit):
        run_command_line(["data", "leaks", *places, "--by", "geometry"])
    assert "--by geometry: expected one of structure, composition" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command_line(["data", "leaks", *places, places[1], "--run", str(tmp_path)])
    assert "is of one dataset, but 2 are named" in capsys.readouterr().err


def test_all_frames_of_a_material_are_left_out_where_a_group_names_one(
    tmp_path: Path, rocksalt: System, capsys: pytest.CaptureFixture[str]
) -> None:
    squeezed = rocksalt.cell * torch.tensor([[2.0], [1.0], [1.0]], dtype=torch.float64)
    strained = System(torch.linalg.solve(rocksalt.cell.T, rocksalt.positions.T).T @ squeezed, squeezed, rocksalt.pbc)
    potassium = [19] * 4 + [17] * 4
    held = [
        replace(structure("salt", rocksalt, SALT), group="mp-22862"),
        replace(structure("salt, strained", strained, SALT), group="mp-22862"),
        replace(structure("of another material", strained, SALT), group="mp-1"),
        replace(structure("sylvite", rocksalt, potassium), group="ClK"),
        replace(structure("sylvite, strained", strained, potassium), group="ClK"),
    ]
    places = [str(tmp_path / "held"), str(tmp_path / "downstream")]
    dataset(tmp_path / "held", held)
    dataset(
        tmp_path / "downstream",
        [structure("table salt", rotated(rocksalt), SALT), structure("sylvite", rotated(rocksalt), potassium)],
    )
    run_command_line(["data", "leaks", *places, "--out", str(tmp_path / "leaks.json")])
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "to leave out of the pre-training: 3 of 5 structures: 2 that were found, 1 more of the same materials" in told
    )
    assert (
        "the group of 1 of them is their formula, which names no material: 1 other structures of these formulas stay "
        "(--by composition leaves them out)" in told
    )
    content = json.loads((tmp_path / "leaks.json").read_text())
    assert content["exclude"] == ["salt", "salt, strained", "sylvite"]
    counts = {"found": 2, "same_material": 1, "found_in_groups_by_formula": 1, "others_of_these_formulas": 1}
    assert content["excluded"] == counts
    (tmp_path / "more.json").write_text('["salt", "of another material"]')
    files = [str(tmp_path / name) for name in ("leaks.json", "more.json")]
    opened = Dataset.open(tmp_path / "held")
    assert read_exclusion(files[:1], opened).tolist() == [0, 1, 3]
    assert read_exclusion(files, opened).tolist() == [0, 1, 2, 3]
    run_command_line(["data", "leaks", *places, "--found-only", "--json"])
    assert json.loads(capsys.readouterr().out)["exclude"] == ["salt", "sylvite"]


def test_only_the_test_part_of_a_run_is_looked_for(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path
) -> None:
    options = deepcopy(finished[0])
    finetune(finetune_options(options, tmp_path / "tuned"), Ranks(), quiet=True)
    downstream = Dataset.open(small_dataset)
    parts = []
    for seed in (0, 1):
        with np.load(tmp_path / "tuned" / f"seed_{seed}" / "split.npz") as split:
            parts.append(set(split["test"].tolist()))
        assert set(downstream.ids(part_tested_by(tmp_path / "tuned" / f"seed_{seed}", downstream))) == parts[-1]
    assert set(downstream.ids(part_tested_by(tmp_path / "tuned", downstream))) == parts[0] | parts[1]
    found = find_leaks(
        downstream, downstream, part_tested_by(tmp_path / "tuned" / "seed_0", downstream), by="composition"
    )
    assert {m.structure_id for m in found.matches} == parts[0]
    with pytest.raises(DataError, match=r"has no split\.npz, so its test part is not known"):
        part_tested_by(tmp_path, downstream)
    other = dataset(tmp_path / "other", [structure("salt", supercell(ROCKSALT, 5.6, 1), SALT)])
    with pytest.raises(DataError, match=r"test structures, such as .*, are not in the dataset\.\nName the dataset"):
        part_tested_by(tmp_path / "tuned", other)


def test_what_leaks_is_left_out_of_a_run(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Dataset.open(small_dataset)
    left_out = sorted(whole.ids([3, 5, 8, 13, 21]))
    (tmp_path / "leaks.json").write_text(json.dumps({"exclude": left_out}))
    options = deepcopy(finished[0])
    options["data"]["exclude"] = str(tmp_path / "leaks.json")
    options["training"]["epochs"] = 1
    run_dir = pretrain(config_of(options, tmp_path / "run"), Ranks())
    assert f"5 excluded by {tmp_path / 'leaks.json'}; " in capsys.readouterr().out
    with np.load(run_dir / "split.npz") as split:
        parts = [split[part].tolist() for part in ("train", "validation", "test")]
    assert sorted(name for part in parts for name in part) == sorted(set(whole.structure_ids.tolist()) - set(left_out))
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["excluded"]["structures"] == 5
    (tmp_path / "leaks.json").write_text(json.dumps(left_out[1:]))
    options["training"]["epochs"] = 2
    with pytest.raises(ConfigError, match="its excluded has changed since it began"):
        run(options, run_dir, resume=True)


def test_an_exclusion_that_does_not_fit_is_refused(pretraining: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "leaks.json"
    found = find_leaks(pretraining, pretraining)
    exclusion = to_exclude(pretraining, [found])
    path.write_text(json.dumps(leaks_as_json(pretraining, "pretraining", "structure", [found], exclusion)))
    assert read_exclusion([str(path)], pretraining).tolist() == [0, 1, 2, 3]
    path.write_text('["salt", "pepper"]')
    with pytest.raises(DataError, match=r"1 of its 2 ids are not in the dataset: pepper\.\nIt would leave in"):
        read_exclusion([str(path)], pretraining)
    for wrong in ('{"leaks": []}', "[3]"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=r"has no list of structure ids\.\nMake it with `dpt-hpc data leaks"):
            read_exclusion([str(path)], pretraining)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_exclusion([str(path)], pretraining)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_exclusion([str(tmp_path / "nowhere")], pretraining)

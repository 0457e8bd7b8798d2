"""Files of others run nothing, lead nowhere else, and are not believed where they contradict themselves."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from crystals import crystals, write_extxyz, write_mlearn
from fuzz_readers import SAMPLE, make_checkpoint, make_export
from fuzz_structures import write_cif

from dpt_hpc.data.catalog import Catalog
from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.manifest import Manifest
from dpt_hpc.data.shard_file import ShardFiles
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError, DataError, EnvironmentFault
from dpt_hpc.plain_text import from_json, from_yaml, yaml_lines
from dpt_hpc.suite.config import load_suite
from dpt_hpc.train.checkpoint import damage, load_model, load_state
from dpt_hpc.train.world import find_world
from dpt_hpc.train.writer import restore

PACKAGE = Path(__file__).resolve().parents[1] / "dpt_hpc"


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


FORBIDDEN = {
    r"yaml\.(unsafe_load|full_load|load_all|safe_load)\b": ("cli/datasets.py",),  # our own file
    r"yaml\.load\(": ("plain_text.py",),  # with a SafeLoader
    r"allow_pickle=True|weights_only=False|shell=True|os\.system|\beval\((?!\))|\bexec\(": (),
    r"\bpickle\.(load|loads|Unpickler)\b": ("data/ingest/pickles.py",),  # which makes nothing but plain records
    r"\btarfile\b|extractall|unpack_archive|\bjoblib\b|\bdill\b": (),
}


def test_nothing_that_runs_what_it_reads_is_called() -> None:
    for pattern, allowed in FORBIDDEN.items():
        found = {
            path.relative_to(PACKAGE).as_posix()
            for path in PACKAGE.rglob("*.py")
            if path.relative_to(PACKAGE).as_posix() not in allowed and re.search(pattern, path.read_text())
        }
        assert not found, f"{pattern}: {found}"
    loads = [line for path in PACKAGE.rglob("*.py") for line in path.read_text().splitlines() if "torch.load(" in line]
    assert loads
    assert all("weights_only=True" in line for line in loads)


def test_a_payload_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = make_checkpoint(tmp_path, "state.pt")
    torch.save({"epoch": Payload()}, state)
    with pytest.raises(EnvironmentFault, match=r"state\.pt has "):
        restore(state.parent.parent)
    with pytest.raises(pickle.UnpicklingError):
        load_state(state.parent)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.mkdir [ran]", "a: !!python/name:os.system", "!!map x"])
def test_tags_of_yaml_make_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"constructor|mapping|not what it seems"):
        from_yaml(text)
    assert not (tmp_path / "ran").exists()


def unfolding(levels: int) -> str:
    return "a0: &a0 [x, x]\n" + "\n".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' stands twice in one mapping"),
        ("a: {b: 1, b: 2}", "the key 'b' stands twice"),
        ("a: &a [*a]", "an alias lies within what it stands for"),
        ("[" * 80 + "]" * 80, "nested more than 64 levels deep"),
        ("[" * 5000, "nested too deeply"),
        (unfolding(9), "unfold to over 1000000 values"),
        ("a: 2001-13-45", "a value is not what it seems to be: month must be in 1..12"),
        ('a: "x\\0y"', "a value with a NUL character"),
    ],
)
def test_yaml_that_nobody_means_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        from_yaml(text)


def test_anchors_and_merged_keys_are_read() -> None:
    assert from_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


def test_lines_of_yaml_are_those_of_keys_and_items_through_aliases_too() -> None:
    lines = yaml_lines("a: &a\n  x: 1\nb: *a\nc:\n- 1\n- *a\n- {z: 3}\n")
    assert lines == {("a",): 1, ("a", "x"): 2, ("b",): 3, ("c",): 4, ("c", "0"): 5, ("c", "1"): 4, ("c", "2"): 7} | {
        ("c", "2", "z"): 7
    }
    assert yaml_lines("c:\n- &a {x: 1}\n- *a\n")["c", "1"] == 1
    deep = "x0: &a0 [1]\n" + "".join(f"x{k}: &a{k} [*a{k - 1}]\n" for k in range(1, 1200))
    assert len(yaml_lines(deep)) == 2400


def test_json_that_nobody_means_is_refused() -> None:
    with pytest.raises(ValueError, match="the key 'a' stands twice in one object"):
        from_json('[{"a": 1, "a": 2}]')
    with pytest.raises(ValueError, match="nested too deeply"):
        from_json("[" * 100_000)


def altered(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def alter(path: Path) -> None:
        raw = json.loads((path / "dataset.json").read_text())
        change(raw)
        (path / "dataset.json").write_text(json.dumps(raw))

    return alter


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["shards"][0].update(file="../../etc/passwd"), r"shards.0.file: .*'../../etc/passwd'"),
        (lambda raw: raw["shards"][0].update(file="/etc/passwd"), r"shards.0.file: "),
        (lambda raw: raw["shards"][0].update(file=".."), r"shards.0.file: "),
        (lambda raw: raw["shards"][0].update(num_bytes="many"), r"shards.0.num_bytes: "),
        (
            lambda raw: raw["shards"][0].update(sha256="0" * 64),
            r"digest is '\w+', but its shards have \w+: it was altered",
        ),
        (lambda raw: raw.update(num_atoms=7), r"num_atoms is 7, but its shards have \d+"),
        (lambda raw: raw["units"].update(energy="Ha"), r"units are .*Ha"),
        (
            lambda raw: raw["statistics"]["elements"].update(Xx={}),
            r"statistics.elements names 'Xx', which is no element",
        ),
        (lambda raw: raw["statistics"].pop("labels"), r"statistics has no labels"),
        (lambda raw: raw.update(extra=1), r"extra: "),
    ],
)
def test_a_manifest_that_was_altered_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    shutil.copytree(SAMPLE, tmp_path / "d")
    altered(change)(tmp_path / "d")
    with pytest.raises(DataError, match=rf"dataset.json: {message}"):
        Manifest.read(tmp_path / "d")


def test_a_shard_leads_to_no_other_file(tmp_path: Path) -> None:
    path = shutil.copy(SAMPLE / "shard_00000.h5", tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        structures, atoms = len(file["cell"]), len(file["positions"])
    files = ShardFiles([path])
    files.check_columns(0, structures, atoms)
    files.close()
    with h5py.File(path, "a") as file:
        del file["positions"]
        file["positions"] = h5py.ExternalLink(str(SAMPLE / "shard_00000.h5"), "positions")
    with pytest.raises(DataError, match=r"s.h5: positions is kept in another file"):
        ShardFiles([path]).check_columns(0, structures, atoms)
    with h5py.File(path, "a") as file:
        del file["positions"]
        raw = [(str(tmp_path / "s.h5"), 0, 24 * atoms)]
        file.create_dataset("positions", (atoms, 3), dtype="f8", external=raw)
    with pytest.raises(DataError, match=r"s.h5: positions is kept in another file"):
        ShardFiles([path]).check_columns(0, structures, atoms)
    with h5py.File(path, "a") as file:
        del file["positions"]
        file["positions"] = np.zeros((atoms, 2))
    with pytest.raises(
        DataError, match=r"positions is float64 of shape \(\d+, 2\), expected kind f of shape \(\d+, 3\)"
    ):
        ShardFiles([path]).check_columns(0, structures, atoms)


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "a\\b", ".x", ""])
def test_a_file_of_a_catalog_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    digest = "0" * 64
    entry = {
        "name": "x", "about": "", "labels": "", "records": 1, "structures": 1, "licence": "", "citation": "", "doi": "",
        "tried": False, "ingested": False, "ingest": None,
        "files": [{"name": name, "url": None, "sha256": digest, "size": 1}],
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps([entry]))
    with pytest.raises(ConfigError, match=r"c.yaml: 2 entries are wrong.\n  0.files.0.name: "):
        Catalog.read(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a/b"])
@pytest.mark.parametrize("place", ["network", "pretraining", "dataset"])
def test_a_cell_of_a_suite_stays_in_its_run_directory(name: str, place: str, tmp_path: Path) -> None:
    names = {"network": "n", "pretraining": "p", "dataset": "d", place: name}
    network = {
        "pretrainings": {names["pretraining"]: {"config": "p.yaml"}},
        "datasets": {names["dataset"]: {"config": "f.yaml"}},
    }
    cells = [{"network": names["network"], "pretrainings": ["baseline"]}]
    suite = {"run_dir": "r", "networks": {names["network"]: network}, "cells": cells}
    (tmp_path / "s.yaml").write_text(json.dumps(suite))
    with pytest.raises(ConfigError, match="names a directory: letters, digits"):
        load_suite(tmp_path / "s.yaml")


def test_the_last_checkpoint_lies_beside_its_link(tmp_path: Path) -> None:
    checkpoints = make_checkpoint(tmp_path, "state.pt").parent.parent
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to("../../elsewhere/step_00000004")
    with pytest.raises(EnvironmentFault, match=r"last: leads to ../../elsewhere/step_00000004, expected a checkpoint"):
        restore(checkpoints)


def test_weights_that_have_changed_are_not_used(tmp_path: Path) -> None:
    """Also where no training goes on from them, which looks at all files anyway."""
    for file in (make_checkpoint(tmp_path, "model.safetensors"), make_export(tmp_path)):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"has changed since it was (written|exported)"):
            load_model(file if file.parent == tmp_path else file.parent)


def test_a_manifest_of_a_checkpoint_lists_its_files_and_no_others(tmp_path: Path) -> None:
    manifest = make_checkpoint(tmp_path, "manifest.json")
    raw = json.loads(manifest.read_text())
    for files in ({}, raw["files"] | {"../../x": {"bytes": 0, "sha256": ""}}):
        manifest.write_text(json.dumps(raw | {"files": files}))
        assert "lists other files than those of a checkpoint" in str(damage(manifest.parent))


INGESTED: list[tuple[Callable[[Path, Any], Path], Callable[[str], str], str]] = [
    (write_extxyz, lambda t: "999999999999\n" + t.partition("\n")[2], "ends within the record: 999999999999 atoms"),
    (write_extxyz, lambda t: "²\n" + t.partition("\n")[2], "starts with '²', expected a number of atoms"),
    (write_extxyz, lambda t: t.replace("energy=", "energy=1 energy=", 1), "record 0: has energy twice"),
    (write_mlearn, lambda t: t.replace('"energy":', '"energy": 1, "energy":', 1), "the key 'energy' stands twice"),
    (
        write_mlearn,
        lambda t: t.replace('"cartesian": false', '"cartesian": "False"', 1),
        "cartesian: is 'False', expected",
    ),
    (write_mlearn, lambda t: re.sub(r'"energy": [-\d.]+', '"energy": true', t, count=1), "energy: not numbers: True"),
    (
        write_mlearn,
        lambda t: re.sub(r'"energy": [-\d.]+', f'"energy": 1{"0" * 400}', t, count=1),
        "energy: not numbers",
    ),
    (write_mlearn, lambda t: t.replace('"X-0"', '"\\ud800"', 1), "structure_id: .* is no text that a file can hold"),
    (write_mlearn, lambda t: t.replace('"atoms": ', '"atoms": ' + "[" * 9000, 1), "nested too deeply"),
    (write_cif, lambda t: t.replace("_cell_length_a", "_cell_lost", 1), "record 0: is no CIF that pymatgen reads"),
]


@pytest.mark.parametrize(("write", "spoil", "reason"), INGESTED)
def test_what_readers_took_for_good_or_fell_over(
    write: Callable[[Path, Any], Path], spoil: Callable[[str], str], reason: str, tmp_path: Path
) -> None:
    file = write(tmp_path, crystals(3))
    file.write_text(spoil(file.read_text()))
    with pytest.raises(DataError, match=rf"{file.name}: [^~]*{reason}"):
        ingest([file], tmp_path / "out", IngestOptions())


def test_what_looks_like_a_key_within_a_value_is_none(tmp_path: Path) -> None:
    file = write_extxyz(tmp_path, crystals(2))
    notes = r'note="\"see id=1\" and \"id=2\"" source=https://a.org/x?id=1 copy=https://b.org/x?id=2 energy='
    file.write_text(file.read_text().replace("energy=", notes, 1))
    ingest([file], tmp_path / "out")
    assert len(Dataset.open(tmp_path / "out")) == 2


def test_a_manifest_beside_an_exported_model_is_of_something_else(tmp_path: Path) -> None:
    file = make_export(tmp_path).rename(tmp_path / "ours.safetensors")
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert load_model(file).state_dict()


def test_blocks_of_one_name_are_all_read(tmp_path: Path) -> None:
    file = write_cif(tmp_path, crystals(3))
    file.write_text(re.sub(r"^data_\S+", "data_same", file.read_text(), flags=re.MULTILINE))
    ingest([file], tmp_path / "out")
    assert len(Dataset.open(tmp_path / "out")) == 3


def test_a_launcher_that_says_impossible_places_is_refused() -> None:
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
    with pytest.raises(EnvironmentFault, match="LOCAL_RANK=9, but WORLD_SIZE=4"):
        find_world(told | {"LOCAL_RANK": "9"})
    with pytest.raises(EnvironmentFault, match="MASTER_PORT is 70000, expected 1 to 65535"):
        find_world(told | {"MASTER_PORT": "70000"})

"""Datasets by name: the catalog itself, a mirror, downloads from a server on this machine, provenance."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from crystals import (
    as_pymatgen,
    crystals,
    dump,
    results,
    vasp_stress,
    write_extxyz,
    write_mptrj,
    write_pickle,
)
from file_server import (  # noqa: F401 - two are fixtures
    CONTENT,
    Served,
    _no_proxy,
    _server,
    digest,
    quiet,
    raw_file,
    serving,
)

from dpt_hpc.cli import run_command_line
from dpt_hpc.data.catalog import Catalog, Entry, Sources, fill_mirror, get_dataset, obtain
from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.inspect import inspect_dataset, origin_lines
from dpt_hpc.data.manifest import Manifest
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError, DataError


@pytest.fixture
def frames(tmp_path: Path) -> bytes:
    """An extended XYZ file with all labels."""
    (tmp_path / "source").mkdir()
    return write_extxyz(tmp_path / "source", crystals()).read_bytes()


def entry_of(url: str | None, content: bytes, **changes: Any) -> dict[str, Any]:
    """A catalog's entry of one extended XYZ file."""
    return {
        "name": "small",
        "about": "A few crystals.",
        "labels": "energy (eV)",
        "records": 4,
        "structures": None,
        "licence": "CC0",
        "citation": "Nobody, J. Tests 1, 1 (2026)",
        "doi": "10.0000/nothing",
        "tried": False,
        "ingested": False,
        "files": [{"name": "small.xyz", "url": url, "sha256": digest(content), "size": len(content)}],
        "ingest": {"max_atoms": 64},
        **changes,
    }


# The catalog.


def test_every_entry_says_what_a_user_must_know() -> None:
    names = [entry.name for entry in Catalog.read()]
    assert len(names) == len(set(names))
    for entry in Catalog.read():
        assert entry.licence
        assert entry.citation
        assert re.fullmatch(r"10\.\d{4,}/\S+", entry.doi), entry.name
        for file in entry.files:
            assert file.url is None or file.url.startswith(("https://", "doi:10.")), file.url
            assert file.url or file.sha256, f"{file.name}: nothing would tell it"
        # What is read together must be told apart: two files of one name cannot lie in one folder.
        assert len({file.name for file in entry.files}) == len(entry.files)


def test_files_of_one_address_are_pinned_alike() -> None:
    pins: dict[str, set[tuple[str | None, int | None]]] = {}
    for entry in Catalog.read():
        for file in entry.files:
            pins.setdefault(file.url or file.name, set()).add((file.sha256, file.size))
    assert all(len(found) == 1 for found in pins.values())


def test_units_of_the_targets_are_those_of_the_paper() -> None:
    wanted = {
        "jdft": {"exfoliation_energy": "meV/atom"},
        "phonons": {"last_phdos_peak": "1/cm"},
        "work_function_2d": {"work_function": "eV"},
        "perovskites": {"formation_energy": "eV/cell"},
        "matbench_mp_e_form": {"formation_energy_per_atom": "eV/atom"},
    }
    catalog = Catalog.read()
    for name, targets in wanted.items():
        options = catalog[name].options
        assert options is not None
        assert options.targets == targets


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"dataset fonons: not in the catalog\.\nDid you mean phonons"):
        Catalog.read()["fonons"]
    with pytest.raises(ConfigError, match="`dpt-hpc data list` shows all"):
        Catalog.read()["xyzzy"]


def test_a_wrong_catalog_is_told_by_entry_and_key(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump([entry_of(None, b"", licence=None, size=3)]))
    with pytest.raises(ConfigError, match=r"own\.yaml: 2 entries are wrong\.\n  0\.licence: .*\n  0\.size: "):
        Catalog.read(path)
    path.write_text(yaml.safe_dump([entry_of(None, b"", ingest={"max_atom": 3})]))
    with pytest.raises(ConfigError, match=r"max_atom.*\nSee `dpt-hpc ingest --help`"):
        Catalog.read(path)
    path.write_text(yaml.safe_dump([entry_of(None, b"")] * 2))
    with pytest.raises(ConfigError, match="two entries have the same name"):
        Catalog.read(path)
    path.write_text("[")
    with pytest.raises(ConfigError, match="not valid YAML"):
        Catalog.read(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Catalog.read(tmp_path / "nowhere.yaml")


def test_list_and_show_say_what_was_not_tried(capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line(["data", "list"])
    told = capsys.readouterr().out
    assert re.search(r"mptrj +1,580,395 .*download not tried, no checksum known, ingest not tried", told)
    assert re.search(r"perovskites +18,928 .*from a mirror only", told)
    run_command_line(["data", "show", "jdft"])
    told = capsys.readouterr().out
    assert "licence: none stated with this copy" in told
    assert "10.1038/s41598-017-05402-0" in told
    assert "2387ac7aac830ab975a18a4b48439529d209dfc0f0ca6580e8d4a2bae2d8207d" in told
    assert "exfoliation_energy" in told
    run_command_line(["data", "show", "mptrj", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["tried"] is False
    assert shown["files"][0]["sha256"] is None
    run_command_line(["data", "list", "--json"])
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} >= {"jdft", "mptrj", "matbench_mp_gap"}


def write_matpes(path: Path, items: list[Atoms]) -> Path:
    """Records as MatPES has them: the stress as six numbers, in kbar, VASP's sign."""
    records = [
        {
            "matpes_id": f"matpes-{i}",
            "structure": as_pymatgen(atoms).as_dict(),
            "energy": results(atoms)["energy"],
            "forces": results(atoms)["forces"].tolist(),
            "stress": [vasp_stress(atoms)[i][j] for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))],
            "bandgap": 0.0,
            "cohesive_energy_per_atom": -3.0,
        }
        for i, atoms in enumerate(items)
    ]
    return dump(path / "MatPES-PBE-2025.1.json", records)


@pytest.mark.parametrize(
    ("name", "write", "first"),
    [
        ("mpf_2021_2_8", write_pickle, "mp-1/0-0"),
        ("mptrj", write_mptrj, "mp-1/mp-1-0-0"),
        ("matpes_pbe_2025_1", write_matpes, "matpes-0"),
    ],
)
def test_the_options_of_sets_that_are_not_at_hand_read_their_form(
    name: str, write: Callable[[Path, list[Atoms]], Path], first: str, tmp_path: Path
) -> None:
    items = crystals()
    ingest([write(tmp_path, items)], tmp_path / "out", Catalog.read()[name].options)
    found = Dataset.open(tmp_path / "out")
    assert len(found) == len(items)
    assert found.structure_ids[0] == first
    for i, atoms in enumerate(items):
        structure = found.get(i)
        assert structure.energy == pytest.approx(results(atoms)["energy"])
        np.testing.assert_allclose(structure.forces, results(atoms)["forces"], atol=1e-12)
        np.testing.assert_allclose(structure.stress, results(atoms)["stress"], atol=1e-12)


# Mirrors.


def test_a_mirror_is_searched_by_name_and_trusted_by_digest(server: Served, tmp_path: Path) -> None:
    mirror, here = tmp_path / "mirror", tmp_path / "here"
    file = raw_file(server.url("set.bin"))
    with pytest.raises(ConfigError, match="no such directory"):
        obtain(file, here, Sources(mirror), quiet)
    (mirror / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has no set\.bin\.\nAdd it where there is internet"):
        obtain(file, here, Sources(mirror), quiet)
    (mirror / "a" / "set.bin").write_bytes(b"other")
    with pytest.raises(DataError, match=f"SHA-256 is {digest(b'other')}, expected {digest(CONTENT)}"):
        obtain(file, here, Sources(mirror), quiet)
    (mirror / "b").mkdir()
    (mirror / "b" / "set.bin").write_bytes(CONTENT)
    found = obtain(file, here, Sources(mirror), quiet)
    assert (found.path, found.how) == (mirror / "b" / "set.bin", "from the mirror")
    assert server.asked == [], "a mirror is asked instead of the network"


def test_a_mirror_may_hold_the_file_in_its_other_form(tmp_path: Path) -> None:
    packed = {"name": "set.bin.gz", "sha256": digest(b"packed"), "size": 6}
    (tmp_path / "set.bin.gz").write_bytes(b"packed")
    found = obtain(raw_file("https://nowhere", also=packed), tmp_path / "here", Sources(tmp_path), quiet)
    assert found.path.name == "set.bin.gz"
    assert found.url == "https://nowhere"


def test_a_filled_mirror_serves_another_machine(frames: bytes, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    with serving({"small.xyz": frames}) as served:
        entry = Entry(**entry_of(served.url("small.xyz"), frames))
        lost = Entry(**entry_of(served.url("lost.xyz"), frames, name="lost"))
        failed = fill_mirror([entry, lost], mirror, Sources(), quiet)
        assert len(failed) == 1
        assert failed[0].startswith("lost: ")
        assert "404" in failed[0]
    assert (mirror / "SHA256SUMS").read_text() == f"{digest(frames)}  small/small.xyz\n"
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=mirror, check=True)
    assert get_dataset(entry, tmp_path / "data", Sources(mirror), quiet) is not None


# Datasets.


def test_a_dataset_by_name_is_that_of_a_plain_ingest_with_its_origin(frames: bytes, tmp_path: Path) -> None:
    with serving({"small.xyz": frames}) as served:
        entry = Entry(**entry_of(served.url("small.xyz"), frames))
        report = get_dataset(entry, tmp_path, Sources(), quiet)
    assert report is not None
    by_hand = ingest([tmp_path / "raw" / "small" / "small.xyz"], tmp_path / "by_hand", IngestOptions(max_atoms=64))
    assert report.manifest.digest == by_hand.manifest.digest
    made_of = Manifest.read(tmp_path / "small").provenance
    assert made_of["licence"] == "CC0"
    assert made_of["doi"] == "10.0000/nothing"
    assert made_of["raw_files"][0]["sha256"] == digest(frames)
    assert made_of["raw_files"][0]["url"] == served.url("small.xyz")
    assert made_of["citation"] == "Nobody, J. Tests 1, 1 (2026). https://doi.org/10.0000/nothing"
    assert str(tmp_path) not in json.dumps(made_of)
    summary = inspect_dataset(tmp_path / "small")
    assert "licence: CC0" in origin_lines(summary.provenance)
    assert origin_lines(inspect_dataset(tmp_path / "by_hand").provenance) == []


def test_inspect_shows_licence_and_citation(frames: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump([entry_of(None, frames)]))
    place = ["--catalog", str(tmp_path / "catalog.yaml"), "--out", str(tmp_path / "data")]
    (tmp_path / "source" / "small.xyz").write_bytes(frames)
    run_command_line(["data", "get", "small", *place, "--mirror", str(tmp_path / "source")])
    told = capsys.readouterr().out
    assert "licence: CC0" in told
    assert "cite: Nobody, J. Tests 1, 1 (2026)" in told
    run_command_line(["inspect", str(tmp_path / "data" / "small")])
    shown = capsys.readouterr().out
    assert "licence: CC0" in shown
    assert digest(frames) in shown.replace("\n", "")
    run_command_line(["data", "get", "small", *place])
    assert "already there" in capsys.readouterr().out


def test_a_dataset_of_something_else_is_not_overwritten(frames: bytes, tmp_path: Path) -> None:
    ingest([tmp_path / "source"], tmp_path / "data" / "small")
    with pytest.raises(DataError, match="already there, and not made of the catalog's small"):
        get_dataset(Entry(**entry_of(None, frames)), tmp_path / "data", Sources(), quiet)


def test_raw_keeps_only_the_files(frames: bytes, tmp_path: Path) -> None:
    (tmp_path / "source" / "small.xyz").write_bytes(frames)
    folds = Entry(**entry_of(None, frames, ingest=None))
    with pytest.raises(ConfigError, match=r"hold no structures\.\nGet them with --raw"):
        get_dataset(folds, tmp_path / "data", Sources(tmp_path / "source"), quiet)
    assert get_dataset(folds, tmp_path / "data", Sources(tmp_path / "source"), quiet, raw=True) is None
    assert [p.name for p in (tmp_path / "data").rglob("*") if p.is_file()] == ["small.xyz"]


@pytest.mark.parametrize("verb", ["list", "show", "get", "mirror", "leaks"])
def test_every_verb_on_datasets_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line(["data", verb, "--help"])
    assert f"Example: dpt-hpc data {verb}" in " ".join(capsys.readouterr().out.split())


def test_a_mirror_is_filled_by_name_or_with_all_that_is_pinned(
    frames: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving({"small.xyz": frames}) as served:
        pinned = entry_of(served.url("small.xyz"), frames)
        unpinned = entry_of(served.url("small.xyz"), frames, name="unpinned")
        unpinned["files"][0] |= {"sha256": None, "size": None}
        catalog = tmp_path / "catalog.yaml"
        catalog.write_text(yaml.safe_dump([pinned, unpinned, entry_of(None, frames, name="nowhere")]))
        command = ["data", "mirror", str(tmp_path / "mirror"), "--catalog", str(catalog)]
        run_command_line([*command, "--all"])
        assert [p.name for p in (tmp_path / "mirror").iterdir() if p.is_dir()] == ["small"]
        run_command_line([*command, "--all", "--unverified"])
        assert sorted(p.name for p in (tmp_path / "mirror").iterdir() if p.is_dir()) == ["small", "unpinned"]
        capsys.readouterr()
        run_command_line([*command, "unpinned", "--unverified"])
        for names, code, told in (
            ([], 1, "name the datasets, or say --all"),
            (["small", "--all"], 1, "name the datasets, or say --all"),
            (["nowhere", "small"], 3, "1 file missing.\nnowhere: small.xyz: no public address holds this file."),
        ):
            with pytest.raises(SystemExit) as caught:
                run_command_line([*command, *names, "--unverified"])
            assert caught.value.code == code
            assert told in capsys.readouterr().err

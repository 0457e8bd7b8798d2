"""What a file says of itself is heeded: the units of its labels; and a key that it has not got is no key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from crystals import as_pymatgen, crystals, write_mlearn, write_pickle

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import DataError

HEAD = 'Lattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3:forces:R:3'
LABELS = 'energy=-2.5 stress="0.5 0 0 0 0.5 0 0 0 0.5"'


def frames(path: Path, stated: str, count: int = 2) -> Path:
    path.write_text("".join(f"1\n{HEAD} {LABELS} {stated} n={i}\nCu 0 0 {i}e-3 0.1 0.2 0.3\n" for i in range(count)))
    return path


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("stress_unit=GPa", r"stress_unit says GPa, read as eV/A\^3: use --stress-unit GPa"),
        ("stress_unit=kB", r"stress_unit says kB, read as eV/A\^3: use --stress-unit kbar"),
        ("stress_units=GPa", r"stress_unit says GPa, read as eV/A\^3: use --stress-unit GPa"),
        ("force_unit=Hartree/Bohr", r"forces_unit says Hartree/Bohr, read as eV/A: use --forces-unit Ha/Bohr"),
        ("energy_unit=meV", r"energy_unit says meV, read as eV: use --energy-unit meV"),
        ("energy_unit=eV/atom", r"energy_unit says eV/atom, read as the total energy: use --energy-kind per_atom"),
        (
            "stress_unit=Mbar",
            r"stress_unit says Mbar, which is none of eV/A\^3, GPa, kbar; read as eV/A\^3: state it with --stress-unit",
        ),
    ],
)
def test_units_stated_in_the_file_must_be_those_it_is_read_in(tmp_path: Path, stated: str, said: str) -> None:
    path = frames(tmp_path / "a.xyz", stated)
    with pytest.raises(DataError, match=rf"a.xyz: 2 broken records among the first 2:\n  record 0: {said}"):
        ingest([path], tmp_path / "out")


@pytest.mark.parametrize(
    ("stated", "options"),
    [
        ("energy_unit=eV forces_unit=eV/A stress_unit=eV/A^3", IngestOptions()),
        ("energy_unit=ev forces_unit=eV/Å stress_unit=eV/Ang^3", IngestOptions()),
        ("stress_unit=eV/Å³ forces_unit=eV/Angstrom", IngestOptions()),
        ("stress_unit=eV/A**3", IngestOptions()),
        ("stress_unit=GPa energy_unit=eV/atom", IngestOptions(stress_unit="GPa", energy_kind="per_atom")),
        ("stress_unit=unknown", IngestOptions(stress_unit="GPa")),
        ("virial_unit=barn length_unit=mile", IngestOptions()),
    ],
)
def test_stated_units_that_agree_pass_in_any_spelling(tmp_path: Path, stated: str, options: IngestOptions) -> None:
    report = ingest([frames(tmp_path / "a.xyz", stated)], tmp_path / "out", options)
    assert report.sources[0].kept == 2
    assert report.sources[0].ignored == {}


def test_units_of_a_renamed_label_and_of_json_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(f"1\n{HEAD} dft=-2.5 dft_unit=Ha\nCu 0 0 0 0.1 0.2 0.3\n")
    with pytest.raises(DataError, match="record 0: energy_unit says Ha, read as eV: use --energy-unit Ha"):
        ingest([path], tmp_path / "out", IngestOptions(energy_key="dft"))
    records = json.loads(write_mlearn(tmp_path, crystals(2)).read_text())
    (tmp_path / "b.json").write_text(json.dumps([{**r, "stress_unit": "GPa"} for r in records]))
    with pytest.raises(DataError, match="record 0: stress_unit says GPa, read as kbar: use --stress-unit GPa"):
        ingest([tmp_path / "b.json"], tmp_path / "out")


def test_a_key_that_no_record_has_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    path = frames(tmp_path / "a.xyz", "material=mp-1 source=here")
    for option, options in (
        ("--group-key", IngestOptions(group_key="materials")),
        ("--id-key", IngestOptions(id_key="materials")),
    ):
        with pytest.raises(DataError, match=rf"a.xyz: {option} is 'materials', but none of its 2 records") as refused:
            ingest([path], tmp_path / "out", options)
        refused.match(rf"they have material, n, source\.\nName one that is there, or leave {option} out")
    ingest([path], tmp_path / "out", IngestOptions(group_key="material"))
    assert Dataset.open(tmp_path / "out").groups.tolist() == ["mp-1"] * 2


def test_formats_without_named_fields_take_no_key(tmp_path: Path) -> None:
    crystal = tmp_path / "a.cif"
    as_pymatgen(crystals(1)[0]).to(filename=str(crystal))
    for path in (write_pickle(tmp_path, crystals()), crystal):
        with pytest.raises(DataError, match=r"has such a field.\nLeave --group-key out for this file"):
            ingest([path], tmp_path / "out", IngestOptions(group_key="mp"))

"""Files that cannot be read to their end are refused, and files that are not read at all are named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crystals import crystals, write_extxyz, write_mptrj, write_traj
from fuzz_structures import write_cif

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.ingest.ase_readers import read_extxyz
from dpt_hpc.data.ingest.record import Broken, Record
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import DataError
from dpt_hpc.use.files import read_structures

SKIPPING = IngestOptions(skip_broken=True)
LOST = "the rest of the file is not read"
MEND = r"\nMend it, or get it again: --skip-broken leaves out single records, not the rest of a file"
FRAME = '2\nLattice="3.6 0 0 0 3.6 0 0 0 3.6" Properties=species:S:1:pos:R:3 energy=-7.{}\nCu 0 0 0\nAu 1.8 1.8 1.8\n'
TEXT = "".join(FRAME.format(i) for i in range(4))


def second(text: str, old: str, new: str) -> str:
    """`text` with `old` replaced in its second frame."""
    frames = text.replace("2\nL", "\0002\nL").split("\0")[1:]
    frames[1] = frames[1].replace(old, new)
    return "".join(frames)


@pytest.mark.parametrize("options", [IngestOptions(), SKIPPING, IngestOptions(skip_broken=True, stride=4)])
@pytest.mark.parametrize(
    ("spoil", "reasons"),
    [
        (
            lambda t: second(t, "2\nL", "1\nL"),
            [
                "record 1: announces 1 atoms, but no record follows",
                f"record 2: starts with 'Au 1.8 1.8 1.8', .*; {LOST}",
            ],
        ),
        (
            lambda t: second(t, "2\nL", "3\nL"),
            ["record 1: is no extended XYZ", f"record 2: starts with 'Lattice=.*, expected a number of atoms; {LOST}"],
        ),
        (
            lambda t: t + "3 kittens\n",
            ["record 3: announces 2 atoms", f"record 4: starts with '3 kittens', .*; {LOST}"],
        ),
        (lambda t: t[:-40], [f"record 3: the file ends within the record: 2 atoms were announced; {LOST}"]),
        (lambda t: "hello\n" + t, [f"record 0: starts with 'hello', .*; {LOST}"]),
    ],
)
def test_extended_xyz_that_loses_its_records(
    tmp_path: Path, spoil: Callable[[str], str], reasons: list[str], options: IngestOptions
) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(spoil(TEXT))
    with pytest.raises(DataError, match=r"a.xyz: the file cannot be read to its end:\n") as refused:
        ingest([path], tmp_path / "out", options)
    for reason in reasons if options.stride == 1 else reasons[-1:]:
        refused.match(reason)
    refused.match(MEND)
    assert not (tmp_path / "out").exists()


def test_a_limit_stops_before_the_place_that_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(second(TEXT, "2\nL", "1\nL"))
    found = list(read_extxyz(path, SKIPPING))
    assert [type(r) for r in found] == [Record, Broken, Broken]
    assert ingest([path], tmp_path / "out", IngestOptions(limit=1)).manifest.num_structures == 1


RECORD: dict[str, Any] = {
    "positions": [[0.0, 0.0, 0.0]],
    "cell": [[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]],
    "atomic_numbers": [29],
}


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_truncated_json_file(tmp_path: Path, suffix: str) -> None:
    text = json.dumps([{**RECORD, "energy": 0.1 * i} for i in range(200)]).encode()
    path = tmp_path / f"raw{suffix}"
    if suffix == ".json":
        path.write_bytes(text[: len(text) // 2])
        reason = rf"raw.json: the file cannot be read to its end:\n  record 100: ends too early at .*; {LOST}{MEND}"
    else:
        packed = gzip.compress(text)
        path.write_bytes(packed[: 2 * len(packed) // 3])
        reason = r"(record \d+: cannot be read: |raw.json.gz: cannot be read: )Compressed file ended"
    for options in (IngestOptions(), SKIPPING):
        with pytest.raises(DataError, match=reason):
            ingest([path], tmp_path / "out", options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [write_mptrj, write_traj])
def test_other_truncated_files(tmp_path: Path, write: Callable[[Path, Any], Path]) -> None:
    path = write(tmp_path, crystals())
    content = path.read_bytes()
    path.write_bytes(content[: 3 * len(content) // 4])
    with pytest.raises(DataError, match=LOST):
        ingest([path], tmp_path / "out", SKIPPING)


def test_a_directory_gives_what_is_known_and_names_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "calculations"
    (folder / "older").mkdir(parents=True)
    write_traj(folder, crystals(2, seed=1))
    write_extxyz(folder, crystals(2, seed=2))
    for name in ("README.md", "notes.dat", ".hidden"):
        (folder / name).write_text("words")
    report = ingest([folder], tmp_path / "out")
    assert [(s.path.name, s.format) for s in report.sources] == [("some.extxyz", "extxyz"), ("some.traj", "ase")]
    line = (
        "left out, as their names tell no format: calculations/README.md, calculations/notes.dat, calculations/older/"
    )
    assert line in report.lines()
    assert Dataset.open(tmp_path / "out").manifests[0].provenance["left_out"] == line
    for i in range(30):
        (folder / f"{i}.log").write_text("words")
    lines = ingest([folder], tmp_path / "again").lines()
    assert any(line.startswith("left out") and line.endswith(" and 13 more") for line in lines)


VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v></varray></kpoints>
 <atominfo><atoms>1</atoms><types>1</types>
  <array name="atoms" ><set><rc><c>Cu</c><c>1</c></rc></set></array></atominfo>
 <structure name="initialpos"><crystal>
  <varray name="basis"><v>3 0 0</v><v>0 3 0</v><v>0 0 3</v></varray></crystal>
  <varray name="positions"><v>0 0 0</v></varray></structure>
 <calculation>
  <scstep>
   <energy><i name="e_fr_energy">-3.5</i><i name="e_wo_entrp">-3.5</i><i name="e_0_energy">-3.5</i></energy>
  </scstep>
  <structure><crystal><varray name="basis"><v>3 0 0</v><v>0 3 0</v><v>0 0 3</v></varray></crystal>
  <varray name="positions"><v>0 0 0</v></varray></structure>
  <varray name="forces"><v>0 0 0</v></varray>
  <varray name="stress"><v>-16.02176634 0 0</v><v>0 -16.02176634 0</v><v>0 0 -16.02176634</v></varray>
  <energy><i name="e_fr_energy">-3.5</i><i name="e_wo_entrp">-3.5</i><i name="e_0_energy">-3.5</i></energy>
 </calculation>
</modeling>
"""


def test_vasp_s_output_is_known_by_its_name_and_its_stress_turned(tmp_path: Path) -> None:
    """VASP writes -16 kbar for a crystal under tension; ASE makes it 0.01 eV/Å³."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "vasprun.xml").write_text(VASPRUN)
    report = ingest([folder], tmp_path / "out")
    assert report.sources[0].format == "ase"
    found = Dataset.open(tmp_path / "out").get(0)
    assert found.energy == pytest.approx(-3.5)
    assert found.stress is not None
    assert found.stress.diagonal().tolist() == pytest.approx([0.01] * 3)


def test_predicted_files_of_one_name_are_told_apart_by_their_folder(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_cif(tmp_path / folder, crystals(2))
    (name,) = {path.name for path in tmp_path.glob("*/*")}
    alone = [s.structure_id for s in read_structures([tmp_path / "a" / name])]
    together = [s.structure_id for s in read_structures([tmp_path / "a", tmp_path / "b"])]
    assert together == [str(tmp_path / folder / own) for folder in ("a", "b") for own in alone]
    assert not any("/" in own for own in alone)

"""What is broken is refused with file and record, or, if asked for, left out and listed."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.ingest.checks import fault
from dpt_hpc.data.ingest.record import Record
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError, DataError

GOOD: dict[str, Any] = {
    "positions": [[0.0, 0.0, 0.0], [1.8, 1.8, 1.8]],
    "cell": [[3.6, 0, 0], [0, 3.6, 0], [0, 0, 3.6]],
    "atomic_numbers": [29, 79],
    "energy": -7.0,
    "forces": [[0.0, 0.0, 0.1], [0.0, 0.0, -0.1]],
    "stress": [[0.01, 0, 0], [0, 0.01, 0], [0, 0, 0.01]],
}
STATED = IngestOptions(stress_unit="eV/A^3", stress_sign="tension_positive", targets={"gap": "eV"})


SKIPPING = replace(STATED, skip_broken=True)


def record(index: int, **fields: Any) -> dict[str, Any]:
    return {"structure_id": f"s{index}", **GOOD, "energy": -7.0 - index, **fields}


def dump(path: Path, records: object) -> Path:
    path.write_text(json.dumps(records))
    return path


BROKEN = [
    ({"energy": math.nan}, r"energy is nan"),
    ({"energy": math.inf}, r"energy is inf"),
    ({"forces": [[0, 0, 0], [0, math.nan, 0]]}, r"forces\[1, 1\] is nan"),
    ({"stress": [[math.nan] * 3] * 3}, r"stress\[0, 0\] is nan"),
    ({"gap": math.nan}, r"gap is nan"),
    ({"positions": [[0, 0, 0], [0, 0, -math.inf]]}, r"positions\[1, 2\] is -inf"),
    ({"cell": [[3.6, 0, 0], [0, 3.6, 0], [3.6, 3.6, 0]]}, r"cell: volume is 0 Å³ for 2 atoms; give a molecule"),
    ({"cell": [[math.nan, 0, 0], [0, 3.6, 0], [0, 0, 3.6]]}, r"cell\[0, 0\] is nan"),
    ({"cell": [[3.6, 0, 0], [0, 3.6, 0]]}, r"cell: shape is \(2, 3\), expected 3x3"),
    ({"positions": [[0, 0], [1, 1]]}, r"positions: shape is \(2, 2\), expected Nx3"),
    ({"positions": [[0, 0, 0]]}, r"positions: shape is \(1, 3\), expected \(2, 3\)"),
    ({"positions": [[0, 0, 0], [1, 1]]}, r"positions: not numbers"),
    ({"forces": [[0, 0, 0]]}, r"forces: shape is \(1, 3\), expected \(2, 3\)"),
    ({"stress": [1, 2, 3]}, r"stress: shape is \(3,\), expected 3x3 or 6"),
    ({"stress": [[0, 1, 0], [0, 0, 0], [0, 0, 0]]}, r"stress: not symmetric"),
    ({"energy": "low"}, r"energy: not numbers"),
    ({"energy": [1.0, 2.0]}, r"energy: shape is \(2,\), expected a number"),
    ({"atomic_numbers": [29, 0]}, r"atomic number 0 is no element"),
    ({"atomic_numbers": [29, 119]}, r"atomic number 119 is no element \(1 to 118\)"),
    ({"atomic_numbers": [29, 79.5]}, r"are not whole numbers"),
    ({"atomic_numbers": [], "positions": [], "forces": []}, r"has no atoms|positions: shape"),
    ({"positions": [[0, 0, 0], [0.001, 0, 0]]}, r"atoms 0 and 1 \(Cu and Au\) are 0.001 Å apart"),
    ({"positions": [[0, 0, 0.001], [3.6, 0, 3.6]]}, r"atoms 0 and 1 \(Cu and Au\) are 0.001 Å apart"),
]


@pytest.mark.parametrize(("fields", "reason"), BROKEN)
def test_a_broken_record_is_refused_by_name_or_left_out_and_listed(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    path = dump(tmp_path / "raw.json", [record(0), record(1, **fields), record(2)])
    with pytest.raises(DataError, match=r"raw.json: 1 broken record among the first 3:\n  record 1: ") as refused:
        ingest([path], tmp_path / "out", STATED)
    refused.match(reason)
    refused.match(r"\nMend them, or leave them out with --skip-broken")
    assert not (tmp_path / "out").exists()
    report = ingest([path], tmp_path / "out", SKIPPING)
    assert report.sources[0].dropped["broken"] == 1
    assert any("broken: record 1: " in line for line in report.lines())
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.structure_ids.tolist() == ["s0", "s2"]
    assert "record 1: " in dataset.manifests[0].provenance["sources"][0]["broken"][0]


def test_the_first_broken_records_are_shown_and_no_more(tmp_path: Path) -> None:
    path = dump(tmp_path / "raw.json", [record(i, energy=math.nan) for i in range(50)])
    with pytest.raises(DataError, match=r"at least 5 broken records among the first 5:") as refused:
        ingest([path], tmp_path / "out", STATED)
    assert str(refused.value).count("energy is nan") == 5
    with pytest.raises(DataError, match="not one structure is left to write"):
        ingest([path], tmp_path / "out", SKIPPING)


def test_missing_fields_and_foreign_records(tmp_path: Path) -> None:
    bare = {k: v for k, v in record(1).items() if k != "cell"}
    path = dump(tmp_path / "raw.json", [record(0), bare, 7, None])
    with pytest.raises(DataError, match=r"record 1: cell is missing \(found structure_id, positions") as refused:
        ingest([path], tmp_path / "out", STATED)
    refused.match(r"record 2: .*int")


LATTICE = 'Lattice="3.6 0 0 0 3.6 0 0 0 3.6"'
FRAME = f"2\n{LATTICE} Properties=species:S:1:pos:R:3 energy=-7.{{:05d}}\nCu 0.0 0.0 0.0\nAu 1.8 1.8 1.8\n"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t[:-40], r"record 2: the file ends within the record: 2 atoms were announced"),
        (lambda t: t.replace("Au 1.8", "Qq 1.8"), r"record 0: is no extended XYZ: KeyError"),
        (lambda t: t.replace("Au 1.8", "Au one"), r"record 0: is no extended XYZ: ValueError"),
        (lambda t: t.replace("Au 1.8 1.8", "Au 1.8"), r"record 0: is no extended XYZ"),
        (lambda t: t.replace("2\nLattice", "3\nLattice", 1), r"starts with 'Lattice|is no extended XYZ"),
        (
            lambda t: t.replace("0 0 0 3.6 0 0 0 3.6", "0 0 0 3.6 0 0 3.6 0").replace(
                " energy", ' virial="1 0 0 0 1 0 0 0 1" energy'
            ),
            r"record 0: cell: volume is 0 Å³ for 2 atoms",
        ),
        (
            lambda t: t.replace(" Properties", ' pbc="F F F" Properties').replace(
                'Lattice="3.6 0 0 0 3.6 0 0 0 3.6"', ""
            ),
            r"volume is 0",
        ),
    ],
)
def test_broken_extended_xyz(tmp_path: Path, spoil: Callable[[str], str], reason: str) -> None:
    (tmp_path / "a.xyz").write_text(spoil("".join(FRAME.format(i) for i in range(3))))
    with pytest.raises(DataError, match=reason):
        ingest([tmp_path / "a.xyz"], tmp_path / "out")


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_text("no crystal")
    (tmp_path / "b.traj").write_text("no trajectory")
    (tmp_path / "c.json").write_text("")
    (tmp_path / "d.json").write_text("[]")
    for name, reason in (
        ("a.cif", "is no CIF that pymatgen reads"),
        ("b.traj", "ASE cannot read it"),
        ("c.json", "starts with '', expected a JSON list or object"),
        ("d.json", "is empty"),
    ):
        with pytest.raises(DataError, match=reason):
            ingest([tmp_path / name], tmp_path / "out")


def test_a_disordered_crystal_is_refused(tmp_path: Path) -> None:
    site = {"species": [{"element": "Cu", "occu": 0.5}, {"element": "Au", "occu": 0.5}], "abc": [0, 0, 0]}
    path = dump(tmp_path / "a.json", [{"lattice": {"matrix": GOOD["cell"]}, "sites": [site]}])
    with pytest.raises(DataError, match=r"record 0: site 0 is disordered \(partial occupancy\)"):
        ingest([path], tmp_path / "out")


def test_missing_sources_and_senseless_options(tmp_path: Path) -> None:
    path = dump(tmp_path / "raw.json", [record(0)])
    with pytest.raises(DataError, match=r"source .*nothing.xyz: no such file"):
        ingest([tmp_path / "nothing.xyz"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"source .*empty: a directory without .xyz"):
        ingest([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(DataError, match=r"no source was given"):
        ingest([], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"target gap: its unit is missing.\nWrite --target gap=UNIT"):
        ingest([path], tmp_path / "out", IngestOptions(targets={"gap": ""}))
    with pytest.raises(ConfigError, match=r"--require names 'force', expected among energy, forces, stress"):
        ingest([path], tmp_path / "out", IngestOptions(require=("force",)))
    with pytest.raises(ConfigError, match="--stride is 0"):
        ingest([path], tmp_path / "out", IngestOptions(stride=0))


def test_required_labels(tmp_path: Path) -> None:
    bare = {k: v for k, v in record(1).items() if k != "stress"}
    path = dump(tmp_path / "raw.json", [record(0), bare])
    required = replace(STATED, require=("energy", "stress"))
    with pytest.raises(DataError, match="record 1: stress missing, but required"):
        ingest([path], tmp_path / "out", required)
    report = ingest([path], tmp_path / "out", STATED)
    assert "  labels: energy, forces, stress in 1 of 2 only" in report.lines()


def test_the_output_of_another_run_is_not_touched(tmp_path: Path) -> None:
    path = dump(tmp_path / "raw.json", [record(0)])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("task: pretrain")
    with pytest.raises(DataError, match=r"output .*run: is not empty; it holds config.yaml.\nName a new directory"):
        ingest([path], run, STATED)
    assert [p.name for p in run.iterdir()] == ["config.yaml"]
    ingest([path], tmp_path / "out", STATED)
    before = (tmp_path / "out" / "dataset.json").read_bytes()
    with pytest.raises(DataError, match="holds a dataset already"):
        ingest([path], tmp_path / "out", STATED)
    assert (tmp_path / "out" / "dataset.json").read_bytes() == before


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "arguments", "name"),
    [
        (os.system, ("touch hacked",), r"(posix|nt)\.system"),
        (eval, ("open('hacked', 'w')",), r"builtins\.eval"),
        (exec, ("open('hacked', 'w')",), r"builtins\.exec"),
        (getattr, ((), "__class__"), r"builtins\.getattr"),
        (subprocess.Popen, (["touch", "hacked"],), r"(subprocess|commands)\.Popen"),
        (np.load, ("hacked",), r"numpy\.load"),
        (Path, ("hacked",), r"pathlib\.\w*Path"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, arguments: tuple[Any, ...], name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    hidden = {"mp-1": {"structure": [Evil(call, *arguments)], "energy": [0.0]}}
    (tmp_path / "block_0.p").write_bytes(pickle.dumps(hidden, protocol=protocol))
    with pytest.raises(DataError, match=rf"block_0.p: the pickle asks for {name}, which the MPF format does not need"):
        ingest(["block_0.p"], "out", IngestOptions(skip_broken=True))
    assert not (tmp_path / "hacked").exists()


def test_a_dotted_name_does_not_pass_the_list(tmp_path: Path) -> None:
    """Protocol 4 allows attributes of attributes: builtins.list.__class__ and the like."""
    for name in ("list.__class__", "object.__subclasses__", "dict.fromkeys"):
        text = b"\x80\x04\x8c\x08builtins\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
        (tmp_path / "block_0.p").write_bytes(text)
        with pytest.raises(DataError, match="the pickle asks for builtins"):
            ingest([tmp_path / "block_0.p"], tmp_path / "out")


def test_a_pickle_cannot_change_a_function(tmp_path: Path) -> None:
    text = b"\x80\x04\x8c\x07copyreg\x8c\x0e_reconstructor\x93}\x8c\x01a\x4b\x01sb."
    (tmp_path / "block_0.p").write_bytes(text)
    with pytest.raises(DataError, match="the pickle asks for the state of a function"):
        ingest([tmp_path / "block_0.p"], tmp_path / "out")


def test_a_truncated_or_foreign_pickle(tmp_path: Path) -> None:
    path = tmp_path / "block_0.p"
    path.write_bytes(pickle.dumps({"mp-1": {"energy": [1.0]}})[:-10])
    with pytest.raises(DataError, match="is no whole pickle"):
        ingest([path], tmp_path / "out")
    path.write_bytes(pickle.dumps({"mp-1": {"energy": [1.0]}, "mp-2": {"structure": [1, 2], "energy": [1.0]}}))
    with pytest.raises(DataError, match="mp-1: has no structure\n  mp-2: its columns differ in length"):
        ingest([path], tmp_path / "out")
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="holds list, expected a dict of materials"):
        ingest([path], tmp_path / "out")


KILLED = """
import sys
from dpt_hpc.data.ingest import IngestOptions, ingest
ingest([sys.argv[1]], sys.argv[2], IngestOptions(shard_atoms=50, keep_duplicates=True))
"""


def test_a_killed_ingest_leaves_nothing_whole_and_may_be_run_again(tmp_path: Path) -> None:
    source, out = tmp_path / "a.xyz", tmp_path / "out"
    source.write_text("".join(FRAME.format(i) for i in range(20_000)))
    with subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(out)]) as process:
        deadline = time.monotonic() + 60
        while not (out / "shard_00003.h5").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (out / "shard_00003.h5").exists()
    with pytest.raises(DataError, match=r"its ingest did not finish.\nRun the same `dpt-hpc ingest` again"):
        Dataset.open(out)
    source.write_text("".join(FRAME.format(i) for i in range(40)))
    ingest([source], out, IngestOptions(shard_atoms=50))
    assert len(Dataset.open(out)) == 40
    assert sorted(p.name for p in out.iterdir()) == ["dataset.json", "shard_00000.h5", "shard_00001.h5"]


def test_across_an_open_boundary_no_atoms_meet(tmp_path: Path) -> None:
    """A film as thick as its cell, atoms at z = 0 and z = c; and a cell that is thin along an open axis only."""
    film: dict[str, Any] = {"positions": [[0, 0, 0], [0, 0, 3.6]], "pbc": [True, True, False]}
    path = dump(tmp_path / "raw.json", [record(0, **film)])
    ingest([path], tmp_path / "out", STATED)
    assert Dataset.open(tmp_path / "out").get(0).pbc.tolist() == [True, True, False]
    closed = dump(tmp_path / "closed.json", [record(0, **{**film, "pbc": [True] * 3})])
    with pytest.raises(DataError, match=r"atoms 0 and 1 \(Cu and Au\) are 0 Å apart"):
        ingest([closed], tmp_path / "closed", STATED)
    thin = {"cell": [[100, 0, 0], [0, 100, 0], [0, 0, 0.005]], "positions": [[0, 0, 0], [5, 5, 0]]}
    for pbc, broken in (([True, True, False], False), ([True] * 3, True), ([False] * 3, False)):
        found = fault(Record("a", np.array([29, 79]), *map(np.array, (thin["positions"], thin["cell"], pbc))))
        assert (found == "cell: a lattice vector is 0.005 Å long") == broken, found


def test_structures_that_differ_in_their_boundaries_are_no_duplicates(tmp_path: Path) -> None:
    records = [{**record(0), "pbc": pbc} for pbc in ([True] * 3, [True, True, False], [True] * 3)]
    report = ingest([dump(tmp_path / "raw.json", records)], tmp_path / "out", STATED)
    assert report.sources[0].duplicates == ["raw.json: record 2 repeats record 0 of raw.json"]
    assert report.manifest.num_structures == 2


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.booleans())
@settings(max_examples=80, deadline=None)
def test_coincident_atoms_are_found_across_any_boundary(seed: int, n: int, coincide: bool) -> None:
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) * rng.uniform(1, 8) + 3 * np.eye(3)
    if abs(np.linalg.det(cell)) < n or np.linalg.norm(np.linalg.inv(cell), axis=0).max() > 2:
        return
    pbc = rng.random(3) < 0.7
    fractional = rng.random((n, 3)) * np.where(pbc, 1, 3)
    positions = fractional @ cell
    if coincide:
        moved = positions[0] + rng.integers(-2, 3, 3) @ cell + 1e-3 * rng.normal(size=3)
        positions = np.concatenate([positions, moved[None]])[rng.permutation(n + 1)]
    images = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), -1).reshape(-1, 3) * pbc @ cell
    away = positions[:, None, None] - positions[None, :, None] + images
    distance = np.linalg.norm(away, axis=-1)
    distance[distance == 0] = 1.0
    expected = bool((distance < 1e-2).any())
    found = fault(Record("record 0", np.full(len(positions), 29), positions, cell, pbc))
    assert (found is not None and "apart" in found) == expected, found

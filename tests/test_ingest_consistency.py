"""Wrong units and signs are refused, right ones never: on real sets, each read in every wrong way."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.ingest.consistency import Consistency
from dpt_hpc.data.ingest.units import STRESS_SIGNS, STRESS_UNITS, Units
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import DataError
from dpt_hpc.quickstart import PACKAGE
from dpt_hpc.structure import Structure

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "pretrain"
EV, GPA, KBAR = "eV/A^3", "GPa", "kbar"
TENSION, COMPRESSION = "tension_positive", "compression_positive"


@cache
def structures(name: str) -> tuple[Structure, ...]:
    """A set in our conventions, read once; 500 records of the larger files."""
    if name == "sample":
        dataset = Dataset.open(PACKAGE / "sample" / "mlearn")
        return tuple(dataset.get(i) for i in range(len(dataset)))
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data")
    with TemporaryDirectory() as folder:
        ingest(
            [path],
            Path(folder) / "out",
            IngestOptions(check=False, limit=None if "-" not in name or "highest" in name else 500),
        )
        dataset = Dataset.open(Path(folder) / "out")
        return tuple(dataset.get(i) for i in range(len(dataset)))


def judge(
    name: str, true: tuple[str, str] = (EV, TENSION), stated: tuple[str, str] = (EV, TENSION), forces: float = 1.0
) -> list[str]:
    """The verdict on a set whose stress is written in the true unit and sign, and read in the stated ones."""
    factor = STRESS_UNITS[stated[0]] * STRESS_SIGNS[stated[1]] / (STRESS_UNITS[true[0]] * STRESS_SIGNS[true[1]])
    consistency = Consistency(Path(name), Units(stress_unit=stated[0], stress_sign=stated[1]))
    for s in structures(name):
        assert s.stress is not None
        assert s.forces is not None
        consistency.show(replace(s, stress=s.stress * factor, forces=s.forces * forces))
    return consistency.conclude()


SLOW = ("mptrj-highest-stress-1k.xyz", "mpf-alkali-TP.xyz", "random-TP.xyz", "mlearn.json.gz")
TELLING = ["sample", "mpf-TP.xyz", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
"""Sets with pressure enough to tell its sign."""
NEAR_EQUILIBRIUM = ["alexandria-random-1k.xyz", pytest.param("mptrj-random-1k.xyz", marks=pytest.mark.slow)]
"""Half of these structures are under less than 0.3 GPa."""


@pytest.mark.parametrize("name", TELLING + NEAR_EQUILIBRIUM)
def test_a_right_reading_passes(name: str) -> None:
    for reading in ((EV, COMPRESSION), (KBAR, COMPRESSION)):
        assert judge(name, reading, reading) == judge(name)


@pytest.mark.parametrize("name", TELLING + NEAR_EQUILIBRIUM)
@pytest.mark.parametrize(("true", "stated"), [((KBAR, TENSION), (EV, TENSION)), ((GPA, COMPRESSION), (EV, TENSION))])
def test_a_unit_that_is_too_large_is_refused_everywhere(
    name: str, true: tuple[str, str], stated: tuple[str, str]
) -> None:
    with pytest.raises(DataError, match=r"contradict|wrong unit|too large"):
        judge(name, true, stated)


@pytest.mark.parametrize("name", TELLING)
def test_the_wrong_sign_is_refused_where_there_is_pressure(name: str) -> None:
    with pytest.raises(DataError, match=r"--stress-sign tension_positive|other sign with --stress-sign"):
        judge(name, (KBAR, TENSION), (KBAR, COMPRESSION))


@pytest.mark.parametrize("name", TELLING)
@pytest.mark.parametrize("stated", [GPA, KBAR])
def test_a_unit_that_is_too_small_is_refused_where_there_is_pressure(name: str, stated: str) -> None:
    with pytest.raises(DataError, match=r"contradict|wrong unit|too large"):
        judge(name, (EV, TENSION), (stated, TENSION))


@pytest.mark.parametrize("name", ["mpf-TP.xyz", pytest.param("mlearn.json.gz", marks=pytest.mark.slow)])
def test_the_wrong_sign_and_unit_of_forces_are_refused(name: str) -> None:
    for factor in (-1.0, 1 / 51.422):
        with pytest.raises(DataError, match=r"energy and forces contradict each other: over \d+ pairs of frames"):
            judge(name, forces=factor)


def test_vasp_output_taken_for_ases_convention_by_way_of_a_file(tmp_path: Path) -> None:
    """The mlearn file's records, in VASP's kbar, offered as if they followed ASE's convention; and rightly."""
    records = [
        {
            "structure_id": str(i),
            "positions": s.positions.tolist(),
            "cell": s.cell.tolist(),
            "atomic_numbers": s.atomic_numbers.tolist(),
            "energy": s.energy,
            "stress": (-1602.176634 * torch.as_tensor(s.stress)).tolist(),
        }
        for i, s in enumerate(structures("sample")[::2])
    ]
    path = tmp_path / "raw.json.gz"
    path.write_bytes(gzip.compress(json.dumps(records).encode()))
    with pytest.raises(DataError) as refused:
        ingest([path], tmp_path / "out", IngestOptions(stress_unit=EV, stress_sign=TENSION))
    refused.match(r"^\S*raw.json.gz: the stress is too large for a solid: 289 pressures have a median size")
    refused.match(r"\nStated: energy eV \(total\), forces eV/A, stress eV/A\^3 \(tension positive\)")
    refused.match(r"\nLook up how the source states its stress, then set --stress-unit; --no-check ingests")
    assert not (tmp_path / "out").exists()
    rightly = IngestOptions(stress_unit=KBAR, stress_sign=COMPRESSION)
    assert any("bulk modulus" in line for line in ingest([path], tmp_path / "out", rightly).lines())
    unchecked = IngestOptions(stress_unit=EV, stress_sign=TENSION, check=False)
    assert ingest([path], tmp_path / "unchecked", unchecked).sources[0].checks == []


@pytest.mark.parametrize(("stated", "kind"), [("per_atom", "total"), ("total", "per_atom")])
def test_energies_of_the_wrong_kind_are_refused(stated: str, kind: str) -> None:
    consistency = Consistency(Path("a.json"), Units(energy_kind=stated))
    for s in structures("sample"):
        assert s.energy is not None
        energy = s.energy * s.num_atoms if stated == "per_atom" else s.energy / s.num_atoms
        consistency.show(replace(s, energy=energy, stress=None, forces=None))
    with pytest.raises(DataError, match=rf"the energies are not total .*\n.*\nState --energy-kind {kind}"):
        consistency.conclude()


def test_a_verdict_does_not_wait_for_the_end_of_a_large_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpt_hpc.data.ingest.consistency.SHOWN", 300)
    consistency = Consistency(Path("a.json"), Units())
    wrong = [replace(s, stress=torch.as_tensor(s.stress) * 1602) for s in structures("sample")]
    for structure in wrong[:299]:
        consistency.show(structure)
    with pytest.raises(DataError, match="the stress is too large for a solid"):
        consistency.show(wrong[299])


def test_small_and_unlabelled_sources_are_not_judged() -> None:
    consistency = Consistency(Path("a.json"), Units())
    for s in structures("sample")[:3]:
        consistency.show(s)
        consistency.show(replace(s, energy=None, forces=None, stress=None))
    assert consistency.conclude() == []


def test_relaxed_slabs_with_vacuum_pass() -> None:
    rng = np.random.default_rng(0)
    consistency = Consistency(Path("slabs"), Units())
    for _ in range(200):
        cell = torch.tensor(np.diag([3.2, 3.2, rng.uniform(15, 30)]))
        stress = torch.tensor(1e-3 * np.diag(rng.normal(size=3)))
        positions = torch.tensor(rng.random((3, 3))) * 3
        numbers = torch.tensor(rng.choice([16, 34, 42, 74], 3))
        consistency.show(
            Structure(positions, cell, torch.ones(3, dtype=torch.bool), numbers, energy=-20.0, stress=stress)
        )
    assert not any("agree" in line for line in consistency.conclude())

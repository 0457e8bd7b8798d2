"""Vacuum in a cell: how thick it is, and that a stress over it is not given without a word."""

from __future__ import annotations

import warnings
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk, fcc111, graphene
from small_runs import Options
from test_cli import fails

import dpt_hpc
from dpt_hpc.cli import run_command_line
from dpt_hpc.use import as_structure
from dpt_hpc.use.doubts import gaps


def test_gaps_are_the_thickest_layers_without_atoms() -> None:
    slab = fcc111("Cu", (1, 1, 3), a=3.6, vacuum=6.0)
    assert gaps(as_structure(slab))[2] == pytest.approx(12.0)
    slab.positions += [0.3, 0.2, 9.0]  # through the boundary, and in a sheared cell the same
    assert gaps(as_structure(slab))[2] == pytest.approx(12.0)
    slab.cell[2] += slab.cell[0]
    assert gaps(as_structure(slab))[2] == pytest.approx(12.0)
    layers = 3.6 / np.sqrt(3)
    assert gaps(as_structure(bulk("Cu", a=3.6))) == pytest.approx([layers] * 3)


def test_a_stress_over_vacuum_is_told(finished: tuple[Options, Path]) -> None:
    model = dpt_hpc.load(finished[1], allow_unknown_elements=True)  # cutoff 4 Å
    slab = fcc111("Cu", (1, 1, 3), a=3.6, vacuum=3.0)
    with pytest.warns(UserWarning, match=r"no atom in 6 Å along cell vector 2, .* vacuum and all"):
        model.predict(slab)
    sheet = graphene(vacuum=3.0)
    sheet.pbc = (True, True, False)
    with pytest.warns(UserWarning, match=r"no atom in 6 Å along cell vector 2"):
        model.predict(sheet)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no atom in")
        model.predict(slab, stress=False)
        model.predict(fcc111("Cu", (1, 1, 3), a=3.6, vacuum=1.9))


def test_what_is_there_is_not_written_over(
    finished: tuple[Options, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ase.io.write(tmp_path / "cu.cif", bulk("Cu"))
    for verb, suffix in (("predict", ".csv"), ("embed", ".npz")):
        out = tmp_path / f"out{suffix}"
        out.write_text("a year's work")
        command = [verb, str(finished[1]), str(tmp_path / "cu.cif"), "-o", str(out), "-q"]
        assert f"--out: {out} is there already" in fails(capsys, 1, *command)
        assert out.read_text() == "a year's work"
        run_command_line([*command, "--force"])
        assert out.read_bytes() != b"a year's work"

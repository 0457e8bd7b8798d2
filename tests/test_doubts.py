"""Vacuum in a cell: how thick it is, and that a stress over it is not given without a word."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, fcc111, graphene
from small_runs import Options

import dpt_hpc
from dpt_hpc.calculator import DPTCalculator
from dpt_hpc.use import as_structure
from dpt_hpc.use.doubts import gaps, reason
from dpt_hpc.use.work import TOLD, Told


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
    with pytest.warns(UserWarning, match=r"vacuum: no atom in 6 Å along lattice vector c, .* vacuum and all"):
        model.predict(slab)
    sheet = graphene(vacuum=3.0)
    sheet.pbc = (True, True, False)
    with pytest.warns(UserWarning, match=r"vacuum: no atom in 6 Å along lattice vector c"):
        model.predict(sheet)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="vacuum")
        model.predict(slab, stress=False)
        model.predict(fcc111("Cu", (1, 1, 3), a=3.6, vacuum=1.9))


def test_the_calculator_tells_each_reason_once(finished: tuple[Options, Path]) -> None:
    slab = fcc111("Cu", (2, 2, 3), a=3.6, vacuum=6.0)
    slab.append("Cu")
    slab.positions[-1] = [0, 0, 0]  # an atom of its own, more than 4 Å below the slab
    slab.calc = DPTCalculator(finished[1])  # type: ignore[call-arg]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            slab.positions[-1, 2] -= 0.1
            slab.get_forces()
    assert sorted({reason(str(w.message)) for w in told}) == ["no neighbour", "vacuum"]
    assert len(told) == 2


def test_many_doubts_of_one_kind_do_not_hide_another() -> None:
    said: list[str] = []
    told = Told(said.append, "warning")
    for _ in range(TOLD + 5):
        told("vacuum: ...", "vacuum")
    told("close atoms: ...", "close atoms")
    assert told.count == TOLD + 6
    assert said[-1] == "warning: close atoms: ..."
    assert len(said) == TOLD + 2

"""The report's numbers: errors of predictions, the paper's tables, comparisons, and how numbers are printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpt_hpc.errors import DataError
from dpt_hpc.report import paper_reference
from dpt_hpc.report.accuracy import (
    Predictions,
    accuracy,
    errors_by_element,
    formula,
    pool,
    values_of,
    worst_structures,
)
from dpt_hpc.report.comparison import Group, compare
from dpt_hpc.report.origin import origin
from dpt_hpc.report.paper import SETS, look_up, paper_set, pretraining_row, same_unit
from dpt_hpc.report.runs import FineTuning, Run, Source
from dpt_hpc.report.sections import place
from dpt_hpc.report.wording import duration, mean_and_std, moment, number, r_squared, short

WATER_AND_SALT: dict[str, Any] = {
    "structure_ids": np.array(["water", "salt"]),
    "num_atoms": np.array([3, 2]),
    "atomic_numbers": np.array([8, 1, 1, 11, 17]),
}


def predictions(**arrays: Any) -> Predictions:
    return Predictions(
        "test", {**WATER_AND_SALT, **{k: np.asarray(v) for k, v in arrays.items()}}, "predictions_test.npz"
    )


def test_errors_are_over_all_components() -> None:
    p = predictions(energy_true=[3.0, -1.0], energy_pred=[6.0, -2.0])
    values = values_of(p, "energy_per_atom")
    assert values is not None
    a = accuracy(values)
    assert a.mae == pytest.approx((1.0 + 0.5) / 2)
    assert a.rmse == pytest.approx(math.sqrt((1.0 + 0.25) / 2))
    # labels 1 and -0.5 per atom: variance 0.5625
    assert a.r2 == pytest.approx(1 - 0.625 / 0.5625)
    assert a.spread == pytest.approx(0.75)
    assert (a.count, a.not_finite) == (2, 0)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    values = values_of(predictions(target_true=[1.0, 2.0], target_pred=[np.nan, 2.5]), "target")
    assert values is not None
    a = accuracy(values)
    assert (a.mae, a.count, a.not_finite) == (0.5, 1, 1)
    assert math.isnan(a.r2), "one label has no variance"


def test_forces_by_element_are_over_the_atoms_of_the_element() -> None:
    true = np.zeros((5, 3))
    predicted = true + np.array([[1.0], [2.0], [4.0], [0.0], [3.0]])
    p = predictions(forces_true=true, forces_pred=predicted)
    values = values_of(p, "forces")
    assert values is not None
    found = {e.symbol: (e.mae, e.count) for e in errors_by_element(values, p)}
    assert found == {"H": (3.0, 2), "O": (1.0, 1), "Na": (0.0, 1), "Cl": (3.0, 1)}


def test_forces_of_labelled_structures_only_find_their_atoms() -> None:
    p = predictions(forces_true=np.zeros((2, 3)), forces_pred=np.ones((2, 3)), forces_structure=[1, 1])
    values = values_of(p, "forces")
    assert values is not None
    assert [e.symbol for e in errors_by_element(values, p)] == ["Na", "Cl"]


def test_energies_by_element_are_over_the_structures_with_the_element() -> None:
    p = predictions(energy_per_atom_true=[0.0, 0.0], energy_per_atom_pred=[0.2, 0.4])
    values = values_of(p, "energy_per_atom")
    assert values is not None
    found = {e.symbol: (e.mae, e.count) for e in errors_by_element(values, p)}
    assert found == {"H": (0.2, 1), "O": (0.2, 1), "Na": (0.4, 1), "Cl": (0.4, 1)}


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"forces_true \(4, 3\)"):
        values_of(predictions(forces_true=np.zeros((4, 3)), forces_pred=np.zeros((4, 3))), "forces")
    with pytest.raises(DataError, match="'target_pred' is missing"):
        values_of(predictions(target_true=[1.0, 2.0]), "target")


def test_seeds_are_pooled_with_their_own_structures() -> None:
    first = predictions(target_true=[1.0], target_pred=[1.0], target_structure=[1])
    second = predictions(target_true=[1.0], target_pred=[3.0], target_structure=[0])
    both = pool([first, second])
    assert both is not None
    values = values_of(both, "target")
    assert values is not None
    assert values.structure.tolist() == [1, 2]
    assert [w.structure_id for w in worst_structures(values, both)] == ["water", "salt"]
    assert pool([]) is None


def test_the_worst_atom_stands_for_its_structure_and_nan_is_worst() -> None:
    predicted = np.zeros((5, 3))
    predicted[1] = [3.0, 4.0, 0.0]
    predicted[4] = np.nan
    p = predictions(forces_true=np.zeros((5, 3)), forces_pred=predicted)
    values = values_of(p, "forces")
    assert values is not None
    worst = worst_structures(values, p)
    assert [w.structure_id for w in worst] == ["salt", "water"]
    assert worst[1].error == 5.0


def test_formulas() -> None:
    assert formula(np.array([8, 3, 3] + [26] * 12)) == "Fe₁₂Li₂O"


def test_the_papers_tables_are_the_papers() -> None:
    jdft = ("jdft", 636, "meV/atom")
    assert paper_reference(*jdft, "cgcnn", "add")["baseline"] == 62.6
    assert paper_reference("phonons", 1265, "1/cm", "cgcnn", "add")["forces_1:500:500"] == 60.7
    assert paper_reference("JDFT", 636, "meV/atom", "torchmd_et", "add")["denoise_derivative"] == 38.6
    assert paper_reference("perovskites", 18928, "eV/cell", "cgcnn", "mean")["forces_1:1:1"] == 0.0360
    work_function = (3814, "eV", "cgcnn", "add")
    assert paper_reference("work_function_2d", *work_function) == paper_reference("2d", *work_function) != {}
    assert paper_reference("mine", 636, "meV/atom", "cgcnn", "add") == {}
    assert paper_reference(*jdft, "torchmd_et", "mean") == {}
    assert paper_reference("jdft", 300, "meV/atom", "cgcnn", "add") == {}
    assert paper_reference("jdft", 636, "eV", "cgcnn", "add") == {}
    for paper in SETS:
        assert look_up(paper.column, "cgcnn", "add") is not None, paper.column
        assert paper_set(paper.column) is paper


def test_table_5_is_used_for_its_lengths_of_pretraining_alone() -> None:
    jdft = look_up("jdft", "cgcnn", "add")
    assert jdft is not None
    assert jdft.of("forces_1:500:500", 100) == (45.5, 2)
    assert jdft.of("forces_1:500:500", 200) == (38.1, 5)
    assert jdft.of("forces_1:500:500") == (45.5, 2)
    assert jdft.of("baseline") == (62.6, 2)
    for row, epochs in (("forces_1:500:500", 40), ("forces_1:1:1", 12), ("denoise_derivative", 50)):
        assert jdft.of(row, epochs) is None, "the number of 100 epochs stands for no other length"
    assert jdft.of("forces_7:7:7") is None
    torchmd = look_up("jdft", "torchmd_et", "add")
    assert torchmd is not None
    assert (torchmd.of("forces_1:1:1", 100), torchmd.of("forces_1:1:1", 50)) == ((50.9, 3), None)


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        (
            {"kind": "derivatives", "energy_weight": 1.0, "forces_weight": 500.0, "stress_weight": 500.0},
            "forces_1:500:500",
        ),
        ({"kind": "derivatives", "energy_weight": 0, "forces_weight": 1, "stress_weight": 0}, "forces_0:1:0"),
        ({"kind": "derivatives", "energy_weight": 0.5}, None),
        ({"kind": "derivative_denoising"}, "denoise_derivative"),
        ({"kind": "head_denoising"}, "denoise_head"),
        ({"kind": "mixed", "energy_weight": 1.0, "forces_weight": 500.0, "stress_weight": 500.0}, None),
        ({"kind": "property"}, None),
    ],
)
def test_an_objective_is_a_row_of_the_paper(objective: Mapping[str, Any], row: str | None) -> None:
    assert pretraining_row(objective) == row


def test_units_are_compared_as_written_by_people() -> None:
    jdft, phonons, perovskites = (s for s in SETS if s.column in ("JDFT", "Phonons", "Perovskites"))
    assert same_unit("meV/atom", jdft)
    assert not same_unit("eV/atom", jdft)
    assert same_unit("cm^-1", phonons)
    assert same_unit("eV", perovskites)
    assert not same_unit("eV/atom", perovskites)
    assert not same_unit("furlong", jdft)


def tuning(name: str, maes: list[float], *, pretrained: str | None = None, **options: Any) -> FineTuning:
    """A finished fine-tuning to the paper's JDFT set."""
    facts = {"epochs": 200, "structures": 636, "dataset": "jdft", "unit": "meV/atom", **options}
    split = {"train": 0.6, "validation": 0.2, "test": 0.2, "by": "structure"}
    config = {
        "task": "finetune",
        "pretrained": pretrained,
        "objective": {"kind": "property", "target": "exfoliation_energy"},
        "model": {"name": "cgcnn", "pooling": "add"},
        "training": {"epochs": facts["epochs"]},
        "data": {"split": split},
    }
    source = Source(f"data/{facts['dataset']}", facts["structures"], None, {})
    results = {"test": {"target_mae": maes[0]}}
    run = Run(Path(f"/{name}/seed_0"), name, config, {}, results, (), (), False, None, {}, (source,))
    seeds = tuple((i, replace(run, results={"test": {"target_mae": mae}})) for i, mae in enumerate(maes))
    return FineTuning(Path(f"/{name}"), name, {"unit": facts["unit"]}, seeds, len(maes))


def compared(*members: FineTuning) -> Group:
    (group,) = compare(members, [])
    return group


def test_a_comparison_sets_seed_against_seed() -> None:
    group = compared(tuning("b", [50.0, 70.0, 60.0], pretrained="gone"), tuning("a", [60.0, 70.0, 80.0]))
    baseline, pretrained = group.entries
    assert (baseline.mean, baseline.std, baseline.improvement) == (70.0, 10.0, None)
    assert baseline.paper == (62.6, 2)
    assert pretrained.improvement == pytest.approx(100 / 7)
    assert pretrained.wins == (2, 3)
    assert pretrained.paper is None, "what it was pre-trained by is not known"
    assert any("3 seeds instead of 5" in note for note in group.notes)
    assert any("187,687" in note for note in group.notes)


def test_the_papers_protocol_is_recognised() -> None:
    assert any("Same protocol" in note for note in compared(tuning("a", [60.0, 61.0, 62.0, 63.0, 64.0])).notes)
    short = compared(tuning("a", [60.0, 61.0, 62.0, 63.0, 64.0], epochs=20))
    assert any("20 epochs instead of 200" in note for note in short.notes)


def test_the_paper_is_not_shown_beside_other_data_or_units() -> None:
    for options, reason in (({"structures": 400}, "636 structures"), ({"unit": "eV/atom"}, "meV/atom")):
        group = compared(tuning("a", [60.0], **options))
        assert group.reference is None
        assert group.entries[0].paper is None
        assert any(reason in note for note in group.notes)
    assert compared(tuning("a", [60.0], dataset="mine")).notes == ()


def test_different_data_are_not_compared() -> None:
    assert len(compare([tuning("a", [1.0]), tuning("b", [1.0], dataset="phonons")], [])) == 2


def test_the_licence_of_the_data_is_found_wherever_it_stands() -> None:
    told = origin(
        {
            "provenance": {
                "sources": [{"file": "a.xyz", "records": 9, "kept": 7, "dropped": {"too large": 2}, "licence": "MIT"}]
            }
        }
    )
    assert told["rights"] == [("Licence", "MIT")]
    assert told["files"][0]["dropped"] == "2 too large"
    assert origin({})["records"] == []


def test_the_periodic_table_is_the_periodic_table() -> None:
    expected = {1: (1, 1), 2: (1, 18), 3: (2, 1), 5: (2, 13), 26: (4, 8), 56: (6, 2), 57: (9, 3), 71: (9, 17)}
    expected |= {72: (6, 4), 86: (6, 18), 89: (10, 3), 104: (7, 4), 118: (7, 18)}
    assert {z: place(z) for z in expected} == expected
    assert len({place(z) for z in range(1, 119)}) == 118


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
        (0.0, "0"),
        (62.649, "62.6"),
        (99.96, "100"),
        (-0.05042, "\u22120.0504"),
        (123456.0, "123,456"),
        (1.5e-7, "1.50\u00a0×\u00a010⁻⁷"),
    ],
)
def test_numbers_are_printed_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_deviation_decides_how_many_digits_its_mean_has() -> None:
    assert mean_and_std(61.234, 4.891) == ("61.2", "4.9")
    assert mean_and_std(0.0437, 0.00052) == ("0.04370", "0.00052")
    assert mean_and_std(61.234, None) == ("61.2", "—")


def test_cells_and_coefficients_are_short() -> None:
    assert (short(4.66e-12), short(0.0), short(117.3)) == ("<0.001", "0", "117")
    assert (r_squared(0.99764), r_squared(-0.0256), r_squared(math.nan)) == ("0.9976", "\u22120.026", "—")


def test_times() -> None:
    assert duration(0.25) == "0.25\u00a0s"
    assert duration(3725) == "1\u00a0h 2\u00a0min"
    assert duration(86400 * 3) == "3\u00a0d"
    assert duration(None) == "—"
    assert moment("2026-11-22T18:00:00+02:00") == "2026-11-22 16:00 UTC"
    assert moment(0) == "1970-01-01 00:00 UTC"

"""Tables of a suite: every number against one computed by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dpt_hpc.report.curves import curve, draw_curves
from dpt_hpc.report.table_files import write_tables
from dpt_hpc.report.tables import Column, Result, Row, Table, bootstrap, improvement_on, improvement_over

BASELINE = Row(
    "baseline", "baseline", {"jdft": Result({0: 50.0, 1: 60.0, 2: 40.0}, 3, 62.6, 2), "x": Result({0: 2.0}, 3)}
)
FORCES = Row(
    "forces_1_1_1",
    "forces 1 : 1 : 1",
    {"jdft": Result({0: 40.0, 1: 54.0, 2: 38.0}, 3, 48.9, 2), "x": Result({0: 1.0, 1: 9.0}, 3, notes=("odd",))},
    structures=3644,
    epochs=100,
    dataset="data/pretrain",
    command="dpt-hpc pretrain a.yaml",
)
NOT_RUN = Row("denoise_derivative", "derivative denoising", {})
COLUMNS = (Column("jdft", "JDFT", "meV/atom", 636), Column("x", "X"), Column("never", "Never"))
TABLE = Table("cgcnn", "add", "CGCNN, add pooling", COLUMNS, (BASELINE, FORCES, NOT_RUN), 2)


def test_means_spreads_and_improvements() -> None:
    jdft = FORCES.results["jdft"]
    assert jdft.mean == pytest.approx(44)
    assert jdft.std == pytest.approx(((4**2 + 10**2 + 6**2) / 2) ** 0.5)
    on_jdft = improvement_on(TABLE, FORCES, "jdft")
    assert on_jdft is not None
    assert on_jdft.value == pytest.approx(100 * (50 - 44) / 50)
    assert on_jdft.paper == pytest.approx(100 * (62.6 - 48.9) / 62.6)
    both = improvement_over(TABLE, FORCES)
    assert both is not None
    assert both.value == pytest.approx((12 + 50) / 2)  # on x, seed 0 alone is shared: 2 -> 1
    assert both.datasets == ("jdft", "x")
    assert both.paper is None  # the paper has no x
    assert both.interval is None  # one seed has no spread
    assert improvement_over(TABLE, BASELINE) is None
    assert improvement_over(TABLE, NOT_RUN) is None


def test_the_interval_is_that_of_all_draws_of_paired_seeds() -> None:
    pairs = [(40.0, 50.0), (54.0, 60.0), (38.0, 40.0)]
    every = sorted(100 * (1 - np.sum(draw, axis=0)[0] / np.sum(draw, axis=0)[1]) for draw in product(pairs, repeat=3))
    # Each of the 27 draws has a weight of 3.7 %: the interval of 95 % reaches from the worst to the best one.
    assert (every[0], every[-1]) == pytest.approx((5, 20))
    assert bootstrap([pairs]) == pytest.approx((5, 20))
    low, high = bootstrap([pairs, pairs]) or (0, 0)
    assert (low, high) == bootstrap([pairs, pairs])  # the same draws whenever it is asked
    assert 5 < low < high < 20  # two datasets are drawn independently
    paired_alike = [(5.0, 10.0), (50.0, 100.0), (1.0, 2.0)]
    assert bootstrap([paired_alike]) == pytest.approx((50, 50))  # unpaired, the baseline's spread would widen it
    assert bootstrap([pairs, [(1.0, 1.0)]]) is None
    assert bootstrap([[(1.0, 1.0), (float("nan"), 1.0)]]) is None


def test_the_words_of_one_epoch_and_of_what_intervals_leave_out(tmp_path: Path) -> None:
    row = replace(FORCES, epochs=1, notes=())
    write_tables([replace(TABLE, rows=(BASELINE, row), notes=("A note.",))], tmp_path, header="# Title")
    text = (tmp_path / "tables.md").read_text()
    assert "of data/pretrain, 1 epoch: `" in text
    assert "Every row is one pre-training, by one seed: how much another one would differ is not in the" in text
    assert "\n\nA note.\n\n|" in text


def test_files_show_what_is_missing_as_missing(tmp_path: Path) -> None:
    write_tables([TABLE], tmp_path, header="# Title")
    text = (tmp_path / "tables.md").read_text()
    assert "| baseline | — | 50 ± 10 [62.6] | 2.00 (1 of 3 seeds) | — | — |" in text
    assert (
        "| forces 1 : 1 : 1 | 3,644 | 44.0 ± 8.7 [48.9] | 5.0 ± 5.7 (2 of 3 seeds) | — | "
        "+31.0 % over 2 of 3 datasets (at least 1 of 3 seeds) |" in text
    )
    assert "| derivative denoising | — | — | — | — | — |" in text
    best = "+12.0 % (forces 1 : 1 : 1) [+21.9 %] | +50.0 % (forces 1 : 1 : 1, 1 of 3 seeds) | — |  |"
    assert f"| best improvement |  | {best}" in text
    assert "pre-trained on 3,644 structures of data/pretrain, 100 epochs: `dpt-hpc pretrain a.yaml`" in text
    assert "- forces 1 : 1 : 1, x: odd" in text
    rows = list(csv.DictReader((tmp_path / "tables.csv").open()))
    assert [(r["pretraining"], r["dataset"]) for r in rows] == [
        ("baseline", "jdft"), ("baseline", "x"), ("forces_1_1_1", "jdft"), ("forces_1_1_1", "x"),
    ]  # fmt: skip
    assert (rows[2]["mae"], rows[2]["improvement"], rows[2]["seeds"]) == ("44", "12", "0 1 2")
    (table,) = json.loads((tmp_path / "tables.json").read_text())
    assert table["rows"][1]["results"]["jdft"]["test_mae"] == {"0": 40.0, "1": 54.0, "2": 38.0}
    assert table["rows"][2]["results"] == {}


def test_a_figure_shows_every_length_that_was_run_and_no_other(tmp_path: Path) -> None:
    short = Row("short", "short", {"jdft": Result({0: 46.0, 1: 50.0}, 2, 46.6, 5)}, structures=455, epochs=12)
    later = Row("later", "later", {}, structures=910, epochs=50)
    table = Table("cgcnn", "add", "CGCNN", COLUMNS, (BASELINE, FORCES, short, later))
    rows = [FORCES, short, later]
    assert [(at, result.mean) for at, result in curve(rows, "jdft", "epochs")] == [(12, 48.0), (100, 44.0)]
    assert [at for at, _ in curve(rows, "jdft", "structures")] == [455, 3644]
    lines = {"forces": ["forces_1_1_1", "short", "later"]}
    drawn = draw_curves(table, lines, "epochs", tmp_path / "figure.png")
    assert drawn == tmp_path / "figure.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert draw_curves(table, {"none": ["later"]}, "epochs", tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()

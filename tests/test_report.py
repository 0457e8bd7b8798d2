"""The report on run directories of every kind and in every state."""

from __future__ import annotations

import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_runs import DERIVATIVES, HOSTILE, predictions, write_run, write_tuning

from dpt_hpc.errors import DataError
from dpt_hpc.report import write_report
from dpt_hpc.report.runs import FineTuning, load_runs, read_metrics


class Page(HTMLParser):
    """What a browser would see: elements in order, ids, text, headings; and that every element is closed."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data.replace("\u00a0", " ")

    @property
    def ids(self) -> list[str]:
        return [str(a["id"]) for _, a in self.attributes if "id" in a]


def report(out: Path, *runs: Path) -> Page:
    return Page(write_report(runs, out / "report.html"))


def test_a_page_of_every_kind_of_run_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    pretrained = write_run(tmp_path / "pretrain", DERIVATIVES, epochs=100, dataset="data/crystals", structures=200)
    denoised = write_run(tmp_path / "denoise", {"kind": "derivative_denoising", "noise_scale": 0.1})
    baseline = write_tuning(tmp_path / "baseline")
    tuned = write_tuning(tmp_path / "tuned", (48.0, 50.0), pretrained=str(pretrained / "checkpoints" / "best"))
    page = report(tmp_path, pretrained, denoised, baseline, tuned)

    assert len(page.ids) == len(set(page.ids)), "ids repeat"
    targets = {str(a["href"])[1:] for _, a in page.attributes if str(a.get("href", "")).startswith("#")}
    assert targets <= set(page.ids)
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "xlink" not in html
    for _, attributes in page.attributes:
        for name in ("src", "href"):
            assert str(attributes.get(name) or "#").startswith("#"), "the page refers to another file"
    levels = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "headings skip a level"
    assert all(a.get("aria-label") for tag, a in page.attributes if tag == "svg")
    assert all(a.get("scope") for tag, a in page.attributes if tag == "th")
    for text in ("62.0 ± 2.8", "+21.0 %", "better in 2 of 2 seeds", "187,687", "+27.3 %", "meV/atom", "GPa", "eV/Å"):
        assert text in page.text, text
    assert "pre-trained by pretrain: energy, forces and stress (loss weights 1 : 500 : 500)" in page.text


def test_denoising_is_told_by_its_way_and_mixed_runs_by_both_halves(tmp_path: Path) -> None:
    head = write_run(tmp_path / "head", {"kind": "head_denoising", "noise_scale": 0.04, "loss": "mse"})
    mixed = {**DERIVATIVES, "kind": "mixed", "denoise_datasets": ["relaxed"], "noise_scale": 0.1}
    mixed["denoise_max_force"] = 0.01
    page = report(tmp_path, head, write_run(tmp_path / "mixed", mixed))
    text = page.text.replace("\u00a0", " ")
    assert "CGCNN with 1,234 parameters was pre-trained by denoising by a head (noise of 0.04 Å)" in text
    assert (
        "was pre-trained on energy, forces and stress (loss weights 1 : 500 : 500), and denoising of structures "
        "without labels and of relaxed and of those without a force above 0.01 eV/Å (noise of 0.1 Å)"
    ) in text
    assert text.count("displacement components") >= 2


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    folder = HOSTILE.replace("/", "_")
    runs = [
        write_run(tmp_path / folder, DERIVATIVES, identity=HOSTILE, dataset=f"data/{folder}"),
        write_run(tmp_path / "_\x1b[31m", DERIVATIVES),
        write_tuning(tmp_path / f"fine {folder}", dataset=f"data/{folder}"),
    ]
    page = report(tmp_path, *runs)
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert "$x^2$" in page.text


def test_a_running_run_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", DERIVATIVES, epochs=2, finished=False)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "step", "epoch": 3, "st')
    (run / "split.npz").unlink()
    page = report(tmp_path, run)
    assert "unfinished, epoch 2 of 3" in page.text
    assert "about 2 s of training are left" in page.text
    assert "The last line of metrics.jsonl is incomplete" in page.text
    assert "Predicted against true" not in page.text


def test_a_run_without_any_record_yet_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", DERIVATIVES, finished=False)
    (run / "metrics.jsonl").unlink()
    assert "No epoch is complete yet." in report(tmp_path, run).text


def test_a_run_in_its_first_epoch_shows_its_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", DERIVATIVES, epochs=1, finished=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    page = report(tmp_path, run)
    assert page.tags.count("figure") == 1
    assert "Faint: single steps." in page.text


def test_a_fine_tuning_between_seeds_says_how_many_are_finished(tmp_path: Path) -> None:
    page = report(tmp_path, write_tuning(tmp_path / "tuning", finished=1))
    assert "1 of 2 seeds finished" in page.text
    assert "60.0" in page.text


def test_one_seed_is_a_fine_tuning_of_one_seed(tmp_path: Path) -> None:
    tuning = write_tuning(tmp_path / "tuning")
    (loaded,) = load_runs([tuning / "seed_1"])
    assert isinstance(loaded, FineTuning)
    assert loaded.finished
    assert report(tmp_path, tuning / "seed_1").text.count("64.0")


def test_waiting_is_drawn_where_a_run_waited(tmp_path: Path) -> None:
    for name, wait, imbalance in (("waits", 0.12, 1.3), ("is quick", 0.004, 1.004)):
        path = write_run(tmp_path / name, DERIVATIVES)
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["kind"] == "epoch" and line["epoch"]:
                line |= {"data_wait": wait, "imbalance": {"mean": imbalance, "max": 2.0}}
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = write_report([path], tmp_path / f"{name}.html").read_text()
        shown = "was without data" in page
        assert shown == (name == "waits")
        assert ("fullest rank over the mean" in page) == shown


def test_an_evaluation_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "results.json").write_text(
        json.dumps({"task": "evaluate", "checkpoint": "runs/a", "data": ["data/x"], "test": {"forces_mae": 0.123}})
    )
    np.savez(folder / "predictions_test.npz", **predictions("derivatives"))
    page = report(tmp_path, folder)
    assert "Evaluation of runs/a on x." in page.text
    assert "0.123" in page.text


def test_an_evaluation_of_a_mixed_network_shows_both_halves(tmp_path: Path) -> None:
    """It has no config: what it predicted says what it is."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    errors = {"forces_mae": 0.123, "noise_mae": 0.0456}
    content = {"task": "evaluate", "checkpoint": "runs/a", "data": ["data/x"], "test": errors}
    (folder / "results.json").write_text(json.dumps(content))
    np.savez(folder / "predictions_test.npz", **predictions("mixed"))
    page = report(tmp_path, folder)
    for text in ("0.123", "0.0456", "force components", "displacement components"):
        assert text in page.text.replace("\u00a0", " "), text


def test_missing_predictions_are_said_to_be_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", DERIVATIVES)
    (run / "predictions_test.npz").unlink()
    assert "no predictions_<part>.npz" in report(tmp_path, run).text


def test_values_that_are_not_numbers_are_shown_as_such(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", DERIVATIVES)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["validation"]["forces_mae"] = None  # the trainer's spelling of NaN
    lines[-1]["train"]["loss"] = math.nan
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = json.loads((run / "results.json").read_text())
    results["test"]["forces_mae"] = None
    (run / "results.json").write_text(json.dumps(results))
    stored = predictions("derivatives")
    stored["forces_pred"][0] = np.nan
    np.savez(run / "predictions_test.npz", **stored)
    text = report(tmp_path, run).text
    assert "not a number in forces" in text
    assert "1 value not a number (NaN or infinite): left out." in text
    assert "3 not a number (NaN or infinite): left out." in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "ep\n{"kind": "step"}\n'), "metrics.jsonl:1: not a"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl:1: expected a JSON object"),
        (lambda run: (run / "run.json").write_text("{"), "run.json: not valid JSON"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml: not valid YAML"),
        (lambda run: (run / "predictions_test.npz").write_bytes(b"PK"), "predictions_test.npz: cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    run = write_run(tmp_path / "run", DERIVATIVES)
    damage(run)
    with pytest.raises(DataError, match=message):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(DataError, match="no such directory"):
        write_report([tmp_path / "none"], tmp_path / "report.html")
    with pytest.raises(DataError, match="no run given"):
        write_report([], tmp_path / "report.html")


def test_only_the_last_line_of_a_log_may_be_cut(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"kind": "step"}\n{"kind')
    assert read_metrics(log) == ([{"kind": "step"}], True)
    log.write_text('{"kind": "step"}\n{"kind"\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(log)

"""The report in a real browser: on wide and narrow screens, light and dark, on paper, with whatever help one reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import LOOKS, cut_off, faults, needs_browser, opened
from browser import _browser as _browser
from written_runs import DERIVATIVES, HOSTILE, write_run, write_tuning

from dpt_hpc.report import write_report

pytestmark = [needs_browser, pytest.mark.slow]

A4 = {"width": 680, "height": 1010}
"""What 15 mm of margin leave of the sheet, in CSS pixels."""
OPEN_ALL = "() => document.querySelectorAll('details').forEach((node) => (node.open = true))"


@pytest.fixture(scope="module")
def report(finished: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page of all kinds of runs, some of them with names that mean harm."""
    folder = tmp_path_factory.mktemp("report")
    name = HOSTILE.replace("/", "_")
    pretrained = write_run(folder / f"long_{'name_' * 12}{name}", DERIVATIVES, identity=HOSTILE)
    runs = [
        pretrained,
        write_run(folder / "running", {**DERIVATIVES, "kind": "mixed"}, finished=False),
        finished[1],
        write_tuning(folder / "baseline", dataset=f"data/{name}"),
        write_tuning(folder / "tuned", (48.0, 50.0), pretrained=str(pretrained / "checkpoints" / "best")),
    ]
    return write_report(runs, folder / "report.html").as_uri()


@pytest.mark.parametrize("look", LOOKS)
def test_everybody_can_read_it(browser: Any, report: str, look: str) -> None:
    with opened(browser, report, look) as page:
        page.evaluate(OPEN_ALL)
        assert not faults(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page itself scrolls sideways"


def test_names_stay_text(browser: Any, report: str) -> None:
    with opened(browser, report) as page:
        assert page.locator("script").count() == 0
        assert page.get_by_text(HOSTILE.replace("/", "_")).count() > 0


def test_paper_holds_all_of_it(browser: Any, report: str) -> None:
    with opened(browser, report, "dark, 1400 px") as page:
        page.emulate_media(media="print", color_scheme="dark")
        page.set_viewport_size(A4)
        page.evaluate(OPEN_ALL)
        assert not cut_off(page)
        colour = "getComputedStyle(document.body).{}"
        assert page.evaluate(colour.format("backgroundColor")) == "rgb(255, 255, 255)"
        assert page.evaluate(colour.format("color")) == "rgb(0, 0, 0)"

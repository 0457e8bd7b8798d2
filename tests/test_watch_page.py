"""The live page in a real browser: it follows a run in training, shows names as text, and is everybody's to read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml
from browser import DARK_AND_NARROW, LOOKS, faults, needs_browser, opened
from browser import _browser as _browser
from small_runs import Options
from test_watch import served

pytestmark = [needs_browser, pytest.mark.slow]

HOSTILE = "<script>window.ran = 1<"
"""With the folder `script>` in it, the name of a run is an element that would run."""
ERROR = f"""2026-11-29T01:02:03+00:00 rank 0
Traceback (most recent call last):
  File "loop.py", line 1, in <module>
    raise ValueError
ValueError: {HOSTILE}/script>
"""


@pytest.fixture(scope="module")
def folder(finished: tuple[Options, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a finished run, and of a failed one with a name that means harm."""
    path = tmp_path_factory.mktemp("watched")
    copytree(finished[1], path / "finished")
    failed = copytree(finished[1], path / HOSTILE / "script>")
    (failed / "results.json").unlink()
    facts = json.loads((failed / "run.json").read_text())
    facts["command"] = f"dpt-hpc {HOSTILE}/script>"
    del facts["finished"]
    (failed / "run.json").write_text(json.dumps(facts))
    (failed / "error.log").write_text(ERROR)
    step = {"epoch": 1, "step": 2, "loss": "nan", "grad_norm": 1.0}
    step["ranks"] = [{"rank": 0, "loss": "nan", "structures": [f"{HOSTILE}/script>"]}]
    (failed / "diverged.json").write_text(json.dumps({"steps": [step]}))
    with served(path) as server:
        yield server.address


def show(page: Any, name: str) -> None:
    """Choose the run of the table whose name begins with `name`."""
    page.locator("#rows a", has_text=name).click()
    page.locator("#run-title", has_text=name).wait_for()


@pytest.mark.parametrize("look", LOOKS)
def test_everybody_can_read_it(browser: Any, folder: str, look: str) -> None:
    for name in ("finished", HOSTILE):
        with opened(browser, folder, look) as page:
            show(page, name)
            for summary in page.locator("summary:visible").all():
                summary.click()
            assert page.locator(".chart svg path").count() > 5
            assert not faults(page)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


def test_what_a_run_is_called_and_says_stays_text(browser: Any, folder: str) -> None:
    with opened(browser, folder) as page:
        show(page, HOSTILE)
        name = f"{HOSTILE}/script>"
        assert page.locator("#run-title").text_content() == name
        assert name in page.locator("#error").text_content()
        assert name in page.locator("#skipped").text_content()
        assert name in page.locator("#command").text_content()
        assert page.locator("#rows .bad").text_content() == "ended by an error"
        assert page.locator("script").count() == 1
        assert page.evaluate("window.ran") is None


def test_keys_are_enough(browser: Any, folder: str) -> None:
    """Tab reaches the runs of the table and the numbers of a chart, Enter opens them, and new data take no focus."""
    with opened(browser, folder, DARK_AND_NARROW) as page:
        show(page, "finished")
        focused = "document.activeElement.textContent"
        for _ in range(8):
            page.keyboard.press("Tab")
            if page.evaluate(focused) == "Numbers":
                break
        assert page.evaluate(focused) == "Numbers"
        page.keyboard.press("Enter")
        loss = page.locator("figure", has_text="Loss").first
        loss.locator("td").first.wait_for()
        assert loss.locator("tbody th").all_text_contents() == ["3", "2", "1", "0"]
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # asks again
        assert page.evaluate(focused) == "Numbers"


def test_it_follows_a_run_from_its_first_epochs_to_its_end(
    browser: Any, finished: tuple[Options, Path], tmp_path: Path
) -> None:
    options = deepcopy(finished[0]) | {"task": "pretrain", "run_dir": str(tmp_path / "runs" / "live")}
    options["training"]["epochs"] = 30
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "dpt_hpc", "pretrain", str(tmp_path / "config.yaml"), "--quiet"]
    with served(tmp_path / "runs") as server, opened(browser, server.address) as page:
        page.locator("#state", has_text="no run here yet").wait_for()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as training:
            done = page.locator("#numbers div", has_text="Epochs done").locator("dd").first
            page.locator("#state", has_text="running").wait_for()
            before = int(done.text_content())
            page.wait_for_function(
                "before => Number(document.querySelector('#numbers dd').textContent) > before", arg=before
            )
            page.locator("#end", has_text="ends about").wait_for()
            page.locator("#state", has_text="finished").wait_for()
            assert training.wait() == 0, training.stderr and training.stderr.read()
        assert done.text_content() == "30"
        assert page.evaluate("document.querySelector('progress').value") == 1
        loss = page.locator("figure", has_text="Loss").first
        loss.locator("summary").click()
        assert loss.locator("tbody tr").count() == 31


def test_it_says_when_the_server_is_gone(browser: Any, finished: tuple[Options, Path]) -> None:
    serving = ExitStack()
    server = serving.enter_context(served(finished[1]))
    with opened(browser, server.address) as page:
        page.locator("#state", has_text="finished").wait_for()
        serving.close()
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.locator("#warning", has_text="does not answer").wait_for()


def test_the_whole_page_works_behind_a_token(browser: Any, finished: tuple[Options, Path]) -> None:
    with served(finished[1], "0.0.0.0") as server:
        address = f"http://127.0.0.1:{server.server_port}/{server.token}/"
        with opened(browser, address) as page:
            page.locator("#state", has_text="finished").wait_for()
            assert page.locator(".chart").count() > 5

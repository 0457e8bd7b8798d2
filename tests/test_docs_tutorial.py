"""The tutorial's commands, exactly as its page writes them, in an empty folder: they end well and say what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"


def blocks() -> list[tuple[str, str]]:
    """Commands, and the output that is shown below them ("" for none)."""
    found = re.findall(r"```(bash|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    pairs: list[tuple[str, str]] = []
    for kind, text in found:
        if kind == "bash":
            pairs.append((text, ""))
        else:
            pairs[-1] = (pairs[-1][0], text)
    return pairs


def pattern(line: str) -> str:
    """What matches a line of the page: `...` is anything, and so is how a terminal breaks lines."""
    return r"\s+".join(".*?".join(map(re.escape, word.split("..."))) for word in line.split())


def test_the_page_shows_every_verb_of_the_way() -> None:
    text = "".join(commands for commands, _ in blocks())
    verbs = ("ingest", "inspect", "pretrain", "finetune", "evaluate", "report", "predict", "embed", "export")
    assert [verb for verb in verbs if f"dpt-hpc {verb}" not in text] == []


@pytest.mark.slow
def test_the_commands_of_the_tutorial_say_what_it_shows(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    script = "set -eu\n"
    shown = []
    for number, (commands, output) in enumerate(blocks()):
        script += f"echo '== {number}'\n{commands}"
        shown.append([line for line in output.splitlines() if line.strip()])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.split(r"^== \d+$", done.stdout, flags=re.MULTILINE)[1:]
    missing = [
        (line, output)
        for lines, output in zip(shown, said, strict=True)
        for line in lines
        if re.search(pattern(line), output) is None
    ]
    assert not missing

"""The README's commands exist as it writes them: targets of make, verbs, options, presets, overrides."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dpt_hpc import __version__
from dpt_hpc.cli import app
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.config_file import load_config

ROOT = Path(__file__).resolve().parent.parent


def commands() -> list[list[str]]:
    """The command lines in the README's code blocks, without comments, continued lines joined."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(\S+=\S+ )*(make|dpt-hpc) ", line)]


COMMANDS = [pytest.param(words, id=" ".join(words)[:60]) for words in commands()]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) > 5


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_readme_exists(words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert {a for a in arguments if "=" not in a} <= set(targets)
        return
    group: Any = typer.main.get_command(app)
    verb, *rest = arguments
    command = group.commands[verb]
    while hasattr(command, "commands"):  # of `data get`, `config init` and the like, the last word is the verb
        command, *rest = command.commands[rest[0]], *rest[1:]
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    assert {a for a in rest if a.startswith("-")} <= known
    if verb in ("pretrain", "finetune"):
        overrides = [value for flag, value in itertools.pairwise(rest) if flag == "--set"]
        load_config(ROOT / rest[0], PretrainConfig if verb == "pretrain" else FinetuneConfig, overrides)


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")

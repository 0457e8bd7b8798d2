"""The references of commands and of options, written from the command line's and the configs' own classes.

A page takes one in where it says `<!-- commands -->`, `<!-- options pretrain -->` or `<!-- exit codes -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer.main

from dpt_hpc.cli import app as command_line
from dpt_hpc.errors import EXIT_CODES
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.config_template import members, template

KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def commands() -> Iterator[str]:
    """Markdown of every verb: what it does, its arguments and options, an example."""
    group: Any = typer.main.get_command(command_line)
    context = typer.Context(group, info_name="dpt-hpc")
    for name in group.list_commands(context):
        yield from _command(group.get_command(context, name), f"dpt-hpc {name}", "##")


def _command(command: Any, name: str, heading: str) -> Iterator[str]:
    yield from (f"{heading} {name}", "", command.help or "", "")
    shown = [parameter for parameter in command.params if parameter.name != "help" and not parameter.hidden]
    if shown:
        yield from ("| argument or option | meaning | default |", "|---|---|---|")
        yield from (_parameter(parameter) for parameter in shown)
        yield ""
    if command.epilog:
        yield from (command.epilog, "")
    for sub in getattr(command, "commands", {}).values():
        yield from _command(sub, f"{name} {sub.name}", heading + "#")


def _parameter(parameter: Any) -> str:
    positional = parameter.param_type_name == "argument"
    names = [parameter.metavar or parameter.name.upper()] if positional else parameter.opts + parameter.secondary_opts
    shown = "" if parameter.default in (None, False, ()) or callable(parameter.default) else f"`{parameter.default}`"
    cells = (", ".join(f"`{name}`" for name in names), getattr(parameter, "help", None) or "", shown)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def options(task: str) -> Iterator[str]:
    """Markdown of every option of a config: all of it, then the other networks and objectives."""
    kind = KINDS[task]
    whole = template(kind, {})
    yield from ("```yaml", whole.rstrip(), "```", "")
    for group, heading in (("model", "Network"), ("objective", "Objective")):
        for member in members(kind, group):
            text = _group(template(kind, {group: member}), group)
            if text not in whole:
                yield from (f"### {heading} `{member}` of `{task}`", "", "```yaml", text, "```", "")


def _group(text: str, name: str) -> str:
    """The lines of one group of options."""
    found = re.search(rf"^{name}:\n(?:^[ #].*\n)*?(?=^(?:#|\w)|\Z)", text, flags=re.MULTILINE)
    assert found is not None, name
    return found[0].rstrip()


def exit_codes() -> Iterator[str]:
    """Markdown of what each exit code means."""
    yield from ("| exit code | meaning |", "|---|---|")
    yield from (f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())


def fill(app: Any, name: str, source: list[str]) -> None:
    """Put the references where a page wants them."""
    source[0] = source[0].replace("<!-- commands -->", "\n".join(commands()))
    source[0] = source[0].replace("<!-- exit codes -->", "\n".join(exit_codes()))
    source[0] = re.sub(r"<!-- options (\w+) -->", lambda found: "\n".join(options(found[1])), source[0])


def setup(app: Any) -> dict[str, bool]:
    """Register the filling in."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""What a check says of one rank, and of all of them together."""

from __future__ import annotations

import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rich.text import Text

from dpt_hpc.errors import DptError, EnvironmentFault
from dpt_hpc.train.ranks import Ranks

Status = Literal["ok", "warn", "bad"]
ORDER: tuple[Status, ...] = ("ok", "warn", "bad")
COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Finding:
    """One line. said: what was found, with numbers. todo: what to do about it. figures: for machines."""

    name: str
    status: Status
    said: str
    todo: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def render(self) -> Text:
        """For a terminal: its line, and below it what to do."""
        todo = f"\n{'':19} -> {self.todo}" if self.todo else ""
        return Text.assemble((f"{self.status:5}", COLOURS[self.status]), f"{self.name:14} {self.said}{todo}")

    def as_json(self) -> dict[str, Any]:
        """As it is, but for numbers that JSON does not have: None."""
        figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.figures.items()}
        return {**asdict(self), "figures": figures}


def ok(name: str, said: str, **figures: Any) -> Finding:
    """A green line."""
    return Finding(name, "ok", said, figures=figures)


def check(name: str, ranks: Ranks, work: Callable[[], Finding], limit: float) -> Finding:
    """What `work` finds on the rank where it is worst, with that rank's place; every rank calls it.

    An error that is a user's to mend, or the machine's, is a red line, on every rank alike. limit: seconds after which
    this process ends with a message: a rank that has failed alone, or hangs, would keep the others waiting for ever.
    """
    place = f"rank {ranks.rank} on {ranks.world.node}"
    stuck = "still at it"

    def give_up() -> None:
        print(f"bad   {name}: not done after {limit:g} s; {place}: {stuck}", file=sys.stderr, flush=True)
        os._exit(EnvironmentFault.exit_code)

    timer = threading.Timer(limit, give_up)
    timer.daemon = True
    timer.start()
    try:
        found = work()
    except DptError as error:
        said, _, todo = str(error).partition("\n")
        found = Finding(name, "bad", said, " ".join(todo.split("\n")))
    except (OSError, RuntimeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        found = Finding(name, "bad", f"{said} ({type(error).__name__} in {where.name})")
    stuck = f"waits for other ranks ({found.status}: {found.said})"
    everyone = ranks.all_gather((found, place))
    timer.cancel()
    return worst([f for f, _ in everyone], [place for _, place in everyone])


def worst(findings: Sequence[Finding], places: Sequence[str]) -> Finding:
    """The gravest finding, the first of them where several are; it names its place unless all that speak say the same.

    A rank that leaves a check to another one says nothing.
    """
    gravest = max(findings, key=lambda f: (ORDER.index(f.status), bool(f.said)))
    if gravest.status == "ok" or len({f.said for f in findings if f.said}) == 1:
        return gravest
    more = sum(f.status == gravest.status for f in findings) - 1
    others = f", and {more} more" if more else ""
    return replace(gravest, said=f"{places[findings.index(gravest)]}{others}: {gravest.said}")

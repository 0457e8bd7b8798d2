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
PATIENCE = 20.0
"""Seconds for which a rank that has failed waits for the others to fail, or to end, as well."""
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
    One that has failed waits only PATIENCE for the others, which may be waiting for it in the middle of the check.
    """
    place = f"rank {ranks.rank} on {ranks.world.node}"
    failed = False
    timer = _end_after(limit, f"{name}: not done after {limit:g} s; {place}: still at it")
    try:
        found = work()
    except DptError as error:
        failed = True
        said, _, todo = str(error).partition("\n")
        found = Finding(name, "bad", said, " ".join(todo.split("\n")))
    except (OSError, RuntimeError) as error:
        failed = True
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        found = Finding(name, "bad", f"{said} ({type(error).__name__} in {where.name})")
    timer.cancel()
    patience = min(limit, PATIENCE) if failed else limit
    timer = _end_after(patience, f"{name}: {found.said or 'done'} ({place}; the other ranks are not back)")
    everyone = ranks.all_gather((found, place))
    timer.cancel()
    return worst([f for f, _ in everyone], [place for _, place in everyone])


def _end_after(seconds: float, said: str) -> threading.Timer:
    """Ends this process, saying so, unless it is cancelled within `seconds`."""

    def give_up() -> None:
        print(f"bad   {said}", file=sys.stderr, flush=True)
        os._exit(EnvironmentFault.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    return timer


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

"""What a check says of one rank, and of all of them together."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dpt_hpc.errors import DptError
from dpt_hpc.train.ranks import Ranks

Status = Literal["ok", "warn", "bad"]
ORDER: tuple[Status, ...] = ("ok", "warn", "bad")


@dataclass(frozen=True)
class Finding:
    """One line. said: what was found, with numbers. todo: what to do about it. figures: for machines."""

    name: str
    status: Status
    said: str
    todo: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As it is, but for numbers that JSON does not have: None."""
        figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.figures.items()}
        return {**asdict(self), "figures": figures}


def ok(name: str, said: str, **figures: Any) -> Finding:
    """A green line."""
    return Finding(name, "ok", said, figures=figures)


def check(name: str, ranks: Ranks, work: Callable[[], Finding]) -> Finding:
    """What `work` finds on the rank where it is worst, with that rank's place; every rank calls it.

    An error that is a user's to mend, or the machine's, is a red line, on every rank alike.
    """
    try:
        found = work()
    except DptError as error:
        said, _, todo = str(error).partition("\n")
        found = Finding(name, "bad", said, " ".join(todo.split("\n")))
    except (OSError, RuntimeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        found = Finding(name, "bad", f"{said} ({type(error).__name__} in {place.name})", "See it with --debug.")
    everyone = ranks.all_gather((found, f"rank {ranks.rank} on {ranks.world.node}"))
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

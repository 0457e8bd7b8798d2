"""The runs in a folder, as their files tell of them: which there are, which of them are running, how far each is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpt_hpc.errors import DataError
from dpt_hpc.report.runs import Run, facts_of, read_json
from dpt_hpc.report.summary import metric
from dpt_hpc.report.wording import number
from dpt_hpc.train.run_lock import holder
from dpt_hpc.watch.faults import ERROR_LOG
from dpt_hpc.watch.log import Log
from dpt_hpc.watch.view import empty, view

SECONDS_BETWEEN_SEARCHES = 10.0
"""A walk over the folders of a large suite is not free, least of all on a cluster's file system."""
DEEPEST = 6
"""Levels of folders below the one that is watched."""
TAIL = 1 << 18
"""Bytes at the end of a log in which its last complete epoch is looked for."""
FACTS = ("config.yaml", "run.json", "results.json")
LOG = "metrics.jsonl"
Stamp = tuple[int, ...]


@dataclass
class Member:
    """One run of the folder. name: its path in the folder. key: the same for addresses. Facts and row are kept as long
    as the files they are from are the same."""

    path: Path
    name: str
    key: str
    log: Log | None = None
    facts: Run | None = None
    facts_of: Stamp = ()
    row: dict[str, Any] = field(default_factory=dict)
    row_of: Stamp = ()


class Folder:
    """A run, a fine-tuning with its seeds, or any folder above runs. Several pages may look at once."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._members: dict[str, Member] = {}
        self._searched = -SECONDS_BETWEEN_SEARCHES
        self._lock = threading.Lock()

    def look(self, chosen: str | None) -> dict[str, Any]:
        """Every run in a row, and all of one: that with the key `chosen`, else the one that began last of those
        that are running, else of all."""
        with self._lock:
            searched = self._search()
            members = list(self._members.values())
            rows = [_row(member, again=searched) for member in members]
            latest = max(
                members, key=lambda m: (m.row["state"] == "running", _written(m.path / "run.json")), default=None
            )
            member = self._members.get(chosen or "", latest)
            shown = None if member is None else self._show(member)
        return {"name": self.path.name or str(self.path), "path": str(self.path), "runs": rows, "run": shown}

    def _search(self) -> bool:
        """Find the runs anew, if it is time to; whether it was."""
        now = time.monotonic()
        if self._members and now - self._searched < SECONDS_BETWEEN_SEARCHES:
            return False
        self._searched = now
        found = find_runs(self.path)
        known = {member.path: member for member in self._members.values()}
        members = [known.get(path) or _member(path, self.path) for path in found]
        self._members = {member.key: member for member in members}
        return True

    def _show(self, member: Member) -> dict[str, Any]:
        member.log = member.log or Log(member.path / LOG)
        member.log.read()
        name = {"key": member.key, "name": member.name, "state": member.row["state"]}
        try:
            return view(_facts(member), member.log, running=member.row["state"] == "running") | name
        except DataError as error:
            return empty(member.path, str(error)) | name


def find_runs(folder: Path) -> list[Path]:
    """Directories at or below `folder` that a run has written into, in the order of their names, numbers as numbers."""
    found = []
    depth = len(folder.parts)
    for place, names, files in os.walk(folder):
        path = Path(place)
        if LOG in files or "run.json" in files:
            found.append(path)
            names.clear()
        elif len(path.parts) - depth >= DEEPEST:
            names.clear()
        names[:] = [name for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: [_natural(part) for part in path.parts])


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text)]


def _member(path: Path, folder: Path) -> Member:
    name = path.name if path == folder else str(path.relative_to(folder))
    key = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
    return Member(path, name, key)


def _stamp(folder: Path, *names: str) -> Stamp:
    """Another one when one of the files has changed."""
    found: list[int] = []
    for name in names:
        try:
            status = (folder / name).stat()
            found += [status.st_mtime_ns, status.st_size, status.st_ino]
        except OSError:
            found.append(0)
    return tuple(found)


def _facts(member: Member) -> Run:
    stamp = _stamp(member.path, *FACTS)
    if member.facts is None or stamp != member.facts_of:
        member.facts, member.facts_of = facts_of(member.path, member.name), stamp
    return member.facts


def _row(member: Member, *, again: bool) -> dict[str, Any]:
    """A line of the table of runs: state, epochs, the last loss on the validation part, that on the test part.

    again: look at the files of a finished run, too.
    """
    if again or not member.row.get("finished"):
        stamp = _stamp(member.path, LOG, ERROR_LOG, *FACTS)
        if stamp != member.row_of:
            member.row, member.row_of = _read_row(member), stamp
    row = member.row
    if not row["finished"]:
        row["state"] = "running" if holder(member.path) is not None else row["otherwise"]
    return {name: row[name] for name in ("key", "name", "state", "epoch", "epochs", "validation", "test")}


def _read_row(member: Member) -> dict[str, Any]:
    """Of a finished run from its results alone: reading the configs of hundreds takes a minute."""
    try:
        results = read_json(member.path / "results.json")
        finished = "finished" in read_json(member.path / "run.json")
        epochs = results["epochs"] if finished and "epochs" in results else _facts(member).total_epochs
    except DataError:
        results, finished, epochs = {}, False, None
    last = _last_record(member.path / LOG)
    failed = _written(member.path / ERROR_LOG) > _written(member.path / LOG)
    return {
        "key": member.key,
        "name": member.name,
        "finished": finished,
        "state": "finished",
        "otherwise": "ended by an error" if failed else "not finished",
        "epoch": last.get("epoch", 0) if last.get("kind") == "epoch" else max(0, last.get("epoch", 1) - 1),
        "epochs": epochs,
        "validation": number(metric(results if finished else last, "validation", "loss")),
        "test": number(metric(results, "test", "loss") if finished else None),
    }


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_record(log: Path) -> dict[str, Any]:
    """The last complete epoch near the end of a log, else the last whole record."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    epochs = (line for line in reversed(lines) if line.startswith(b'{"kind": "epoch"'))
    line = next(epochs, lines[-1] if lines else b"{}")
    try:
        record = json.loads(line)
        known = isinstance(record, dict) and isinstance(record.get("epoch"), int)
    except ValueError:
        known = False
    return record if known else {}

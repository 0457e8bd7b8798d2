"""How far a suite is: what is done, who runs what, what is missing, and how long that takes."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt_hpc.report.wording import duration
from dpt_hpc.suite.facts import unused_record
from dpt_hpc.suite.plan import FinetuneCell, Plan, PretrainCell
from dpt_hpc.suite.work import Unit, left_of, units_of
from dpt_hpc.train.run_lock import holder

Kind = tuple[str, str, int]
"""What takes like times: network, data, epochs."""

TAIL = 1 << 18
"""Bytes at the end of a log in which its last epoch is looked for."""


@dataclass(frozen=True)
class UnitState:
    """A run of the suite. epoch: its last complete one. holder: the process that writes it. seconds: it took."""

    unit: Unit
    finished: bool
    epoch: int
    holder: str | None
    seconds: float | None

    @property
    def word(self) -> str:
        """done, recorded, running, begun or missing."""
        if self.finished:
            return "done" if self.unit.ended else "recorded"
        return "running" if self.holder is not None else "begun" if self.epoch else "missing"


def look(plan: Plan) -> list[UnitState]:
    """The state of every run of `plan`, in its order."""
    return [_look(unit) for cell in plan.order for unit in units_of(cell)]


def remaining_seconds(states: list[UnitState]) -> tuple[float, int]:
    """What one worker would need for all that is not done, judged by the finished runs of the same network, data and
    number of epochs; and of how many runs nothing is known."""
    known: dict[Kind, list[float]] = defaultdict(list)
    for state in states:
        if state.finished and state.seconds is not None:
            known[_kind(state.unit)].append(state.seconds)
    total, unknown = 0.0, 0
    for state in states:
        if not state.finished:
            seconds = known.get(_kind(state.unit))
            if seconds is None:
                unknown += 1
            else:
                total += statistics.fmean(seconds) * (1 - state.epoch / state.unit.cell.config.training.epochs)
    return total, unknown


def describe(plan: Plan) -> list[str]:
    """The lines of `--status`: a line for each cell, and the sum."""
    states = look(plan)
    lacking = set(left_of([state.unit for state in states]))
    lines = []
    for cell in plan.order:
        own = [state for state in states if state.unit.cell is cell]
        lines.append(f"{_words(own):24} {cell.path}")
        lines += [f"{'':24} {s.unit.path}: epoch {s.epoch}, {s.holder}" for s in own if s.word == "running"]
        lines += [f"{'':24} {fault.splitlines()[0]}" for s in own if not s.finished and (fault := s.unit.fault)]
        if unused := unused_record(cell):
            lines.append(f"{'':24} {unused}")
        if lacking & {state.unit for state in own if state.finished}:
            lines.append(f"{'':24} recorded without its weights: it runs again for the fine-tunings that are left")
    words = ("done", *(["recorded"] if plan.records else []), "running", "begun", "missing")
    count = {word: sum(s.word == word for s in states) for word in words}
    lines.append(", ".join(f"{number} {word}" for word, number in count.items()) + f" of {len(states)} runs")
    if not all(state.finished for state in states):
        seconds, unknown = remaining_seconds(states)
        workers = max(count["running"], 1)
        if seconds:
            lines.append(
                f"about {duration(seconds / workers)} left for {workers} worker(s), judged by the finished runs"
            )
        if unknown:
            lines.append(f"not counted: {unknown} run(s) of whose kind (network, data, epochs) none has finished")
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for programs."""
    states = look(plan)
    seconds, unknown = remaining_seconds(states)
    runs = [{"run": str(s.unit.path), "state": s.word, "epoch": s.epoch, "holder": s.holder} for s in states]
    return {"runs": runs, "seconds_left_for_one_worker": seconds, "runs_of_unknown_length": unknown}


def _look(unit: Unit) -> UnitState:
    finished = unit.finished
    if finished and not unit.ended:
        return UnitState(unit, True, unit.cell.config.training.epochs, None, None)
    if finished:
        seconds = json.loads((unit.path / "run.json").read_text()).get("wall_seconds")
        return UnitState(unit, True, unit.cell.config.training.epochs, None, seconds)
    return UnitState(unit, False, _last_epoch(unit.path / "metrics.jsonl"), holder(unit.path), None)


def _last_epoch(log: Path) -> int:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        if line.startswith(b'{"kind": "epoch"') and line.endswith(b"}"):
            return int(json.loads(line)["epoch"])
    return 0


def _kind(unit: Unit) -> Kind:
    cell: PretrainCell | FinetuneCell = unit.cell
    return cell.network, "+".join(cell.config.data.path), cell.config.training.epochs


def _words(states: list[UnitState]) -> str:
    if len(states) == 1:
        return states[0].word
    done = sum(state.finished for state in states)
    recorded = sum(state.word == "recorded" for state in states)
    if done == len(states):
        return "recorded" if recorded == done else f"done, {recorded} recorded" if recorded else "done"
    words = {s.word for s in states}
    word = next((w for w in ("running", "begun") if w in words), "missing" if not done else "begun")
    return f"{word}, {done} of {len(states)} seeds"

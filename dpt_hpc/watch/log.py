"""A metrics.jsonl that a run is writing: every byte of it is read once, however long it grows."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

from dpt_hpc.watch.thinned import Thinned

PIECE = 1 << 23
"""Bytes that one look at a log reads at most, so that a page with a long log to catch up with is not kept waiting."""

WARNINGS = 5
"""How many warnings are shown: the last ones."""


class Log:
    """What has been read of a log so far.

    epochs: the records of complete epochs. steps: every number of the steps' records, thinned. step, time: of the last
    record. not_finite: losses of steps that were no numbers. damaged: lines that are not records. warnings: the last
    ones. behind: the part of the file that is still to be read, 0 to 1.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget(None)

    def _forget(self, identity: tuple[int, int] | None) -> None:
        self._identity, self._offset = identity, 0
        self.epochs: list[dict[str, Any]] = []
        self.steps: dict[str, Thinned] = {}
        self.step, self.time = 0, 0.0
        self.not_finite = self.damaged = 0
        self.warnings: deque[str] = deque(maxlen=WARNINGS)
        self.behind = 0.0

    def read(self) -> None:
        """Take in what has been written since, at most PIECE bytes.

        A last line without an end is being written: it waits for the next call. A log that was replaced, as by a run
        that goes on from a checkpoint, is read anew. One that is not there is empty.
        """
        try:
            file = self.path.open("rb")
        except OSError:
            self._forget(None)
            return
        with file:
            status = os.fstat(file.fileno())
            identity = status.st_dev, status.st_ino
            if identity != self._identity or status.st_size < self._offset:
                self._forget(identity)
            file.seek(self._offset)
            piece = file.read(PIECE)
        full = len(piece) == PIECE
        whole = piece.rfind(b"\n") + 1 or (PIECE if full else 0)  # no record is as long as a piece
        self._offset += whole
        self.behind = max(0.0, 1 - self._offset / status.st_size) if full else 0.0
        for line in piece[:whole].splitlines():
            if line.strip():
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            kind, epoch, step = record["kind"], int(record["epoch"]), int(record["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self.damaged += 1
            return
        if step < self.step:
            self._go_back(epoch, step)
        self.step = step
        if is_finite(record.get("time")):
            self.time = float(record["time"])
        if kind == "epoch":
            self.epochs.append({**record, "epoch": epoch, "step": step})
        elif kind == "warning":
            self.warnings.append(f"Epoch {epoch}, step {step}: {record.get('text')}")
        elif kind == "step":
            self.not_finite += not is_finite(record.get("loss"))
            for name, value in record.items():
                if name not in ("epoch", "step") and is_finite(value):
                    if name not in self.steps:
                        self.steps[name] = Thinned()
                    self.steps[name].add(step, value)

    def _go_back(self, epoch: int, step: int) -> None:
        """A run that goes on from a checkpoint comes to later steps again."""
        self.epochs = [r for r in self.epochs if r["epoch"] < epoch]
        for series in self.steps.values():
            series.cut(step)


def is_finite(value: Any) -> bool:
    """Whether a value of a record is a number; NaN and infinity are none, and the trainer writes them as null."""
    return isinstance(value, (int, float)) and math.isfinite(value)

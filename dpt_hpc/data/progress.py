"""How far long work is: one line that is rewritten on a terminal, one now and then in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dpt_hpc.data.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    from typing_extensions import Self

    from dpt_hpc.data.ingest import SourceReport

ON_TERMINAL, IN_FILE = 0.2, 30.0
"""Seconds between two lines."""
COUNTED = 1 << 31
"""Bytes of extended XYZ that are read once more, to count their structures before any is computed."""


class Progress:
    """Counts what is done, and says rate, share and time left on stderr. total: None if nobody knows."""

    def __init__(
        self, total: int | None, *, quiet: bool, unit: str = "structures", stream: TextIO | None = None
    ) -> None:
        self.total, self.quiet, self.unit = total, quiet, unit
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.count = self._first = 0
        self.started = self._told = time.monotonic()
        self._every = ON_TERMINAL if self.terminal else IN_FILE

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def step(self) -> None:
        """One more is done."""
        self.reach(self.count + 1)

    def reach(self, count: int) -> None:
        """So many are done."""
        self.count = count
        if not self.quiet and time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            self.stream.write(f"\r{self.line()}\033[K" if self.terminal else f"{self.line()}\n")
            self.stream.flush()

    def go_on(self, count: int, total: int | None) -> None:
        """So many of `total` are done; fewer than before: of something new, the first ones of which were there."""
        if count < self.count or self.total is None:
            self.started, self._first, self.total = time.monotonic(), count, total
        self.reach(count)

    def line(self) -> str:
        """As it is told."""
        rate = (self.count - self._first) / max(self.seconds, 1e-9)
        done = f"{self.count:,}" if self.total is None else f"{self.count:,} of {self.total:,}"
        text = f"{done} {self.unit}, {rate:,.1f}/s"
        if self.total is None or not rate:
            return text
        left = max(self.total - self.count, 0) / rate
        end = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
        return f"{text}, {_span(left)} left (until {end})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the line that is being rewritten."""
        if self.terminal and not self.quiet and self._told > self.started:
            self.stream.write("\r\033[K")


class IngestProgress(Progress):
    """Counts the records of an ingest. total: if nobody tells, they are counted beforehand where that is cheap."""

    def __init__(
        self, sources: Sequence[str | Path], file_format: str | None, *, total: int | None = None, quiet: bool
    ) -> None:
        if total is None and not quiet:
            total = count_structures(sources, file_format)
        super().__init__(total, quiet=quiet, unit="records")
        self._read: dict[Path, int] = {}

    def told(self, report: SourceReport) -> None:
        """How far one source is."""
        self._read[report.path] = report.records
        self.reach(sum(self._read.values()))


def count_structures(paths: Sequence[str | Path], file_format: str | None = None) -> int | None:
    """How many structures there are in datasets, single CIFs and extended XYZ of bounded size; None for others."""
    from dpt_hpc.data.ingest.formats import format_of_name
    from dpt_hpc.data.ingest.json_stream import open_text
    from dpt_hpc.data.ingest.sources import find_sources

    total = 0
    for path in map(Path, paths):
        if (path / MANIFEST_NAME).is_file():
            total += Manifest.read(path).num_structures
            continue
        for file in find_sources([path]).paths:
            kind = file_format or format_of_name(file)
            if kind == "cif":
                total += 1
            elif kind == "extxyz" and file.stat().st_size <= COUNTED:
                with open_text(file) as stream:
                    while (head := stream.readline().strip()).isdigit():
                        total += 1
                        for _ in range(int(head) + 1):
                            stream.readline()
            else:
                return None
    return total


def _span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}"

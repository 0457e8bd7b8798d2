"""How far a long prediction is: one line that is rewritten on a terminal, one now and then in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dpt_hpc.data.manifest import MANIFEST_NAME, Manifest

ON_TERMINAL, IN_FILE = 0.2, 30.0
"""Seconds between two lines."""
COUNTED = 1 << 31
"""Bytes of extended XYZ that are read once more, to count their structures before any is computed."""


class Progress:
    """Counts structures, and says rate, share and time left on stderr. total: None if nobody knows."""

    def __init__(self, total: int | None, *, quiet: bool, stream: TextIO | None = None) -> None:
        self.total, self.quiet = total, quiet
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.count = 0
        self.started = self._told = time.monotonic()
        self._every = ON_TERMINAL if self.terminal else IN_FILE

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def step(self) -> None:
        """One more structure is done."""
        self.count += 1
        if not self.quiet and time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            self.stream.write(f"\r{self.line()}\033[K" if self.terminal else f"{self.line()}\n")
            self.stream.flush()

    def line(self) -> str:
        """As it is told."""
        rate = self.count / max(self.seconds, 1e-9)
        done = f"{self.count:,}" if self.total is None else f"{self.count:,} of {self.total:,}"
        text = f"{done} structures, {rate:,.1f}/s"
        if self.total is None:
            return text
        left = max(self.total - self.count, 0) / max(rate, 1e-9)
        end = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
        return f"{text}, {_span(left)} left (until {end})"

    def close(self) -> None:
        """End the line that is being rewritten."""
        if self.terminal and not self.quiet and self._told > self.started:
            self.stream.write("\r\033[K")


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

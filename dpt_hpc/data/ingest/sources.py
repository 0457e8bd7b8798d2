"""Which files an ingest reads: those that the user names, and in directories those whose name tells their format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dpt_hpc.data.ingest.formats import SUFFIXES, VASP_OUTPUT, format_of_name
from dpt_hpc.errors import DataError

NAMED = 20
"""Files left out that are told by name; all are counted."""


@dataclass
class Sources:
    """The files to read, in order; left_out: names of the other entries of the directories that were given."""

    paths: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def left_out_line(self) -> str:
        """For the terminal and for dataset.json; empty if nothing was left out."""
        if not self.left_out:
            return ""
        more = f" and {len(self.left_out) - NAMED} more" if len(self.left_out) > NAMED else ""
        return f"left out, as their names tell no format: {', '.join(self.left_out[:NAMED])}{more}"


def find_sources(sources: Sequence[str | Path]) -> Sources:
    """The files named, and those of known name in the directories named, sorted; hidden entries are not looked at.

    Raises DataError for a path that is not there, and for a directory without a file that can be read.
    """
    found = Sources()
    for source in map(Path, sources):
        if source.is_dir():
            entries = sorted(p for p in source.iterdir() if not p.name.startswith("."))
            inside = [p for p in entries if p.is_file() and format_of_name(p) is not None]
            if not inside:
                known = ", ".join([*SUFFIXES, *VASP_OUTPUT])
                raise DataError(f"source {source}: a directory without {known} files.\nName the files.")
            found.paths += inside
            found.left_out += [f"{source.name}/{p.name}{'/' if p.is_dir() else ''}" for p in entries if p not in inside]
        elif source.is_file():
            found.paths.append(source)
        else:
            raise DataError(f"source {source}: no such file.\nCheck the path.")
    if not found.paths:
        raise DataError("ingest: no source was given.\nName at least one file.")
    return found

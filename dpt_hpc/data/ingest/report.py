"""What an ingest did with every record, for the terminal and for the provenance in dataset.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpt_hpc.data.manifest import Manifest

LISTED = 20
"""Broken records and duplicates that dataset.json lists by name; all are counted."""
SHOWN = 5
"""How many of them the terminal shows."""


@dataclass
class SourceReport:
    """One file: what it is taken for, and what became of its records."""

    path: Path
    format: str
    detected: bool
    units: str
    sha256: str
    records: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    repeated: int = 0
    relabelled_count: int = 0
    checks: list[str] = field(default_factory=list)

    @staticmethod
    def name(entry: str, listed: list[str]) -> None:
        """Add a record to one of the lists, if it is among the first."""
        if len(listed) < LISTED:
            listed.append(entry)

    def summary(self) -> dict[str, Any]:
        """As JSON. Only the file's name is kept: directories are the machine's business."""
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "format": self.format,
            "units": self.units,
            "records": self.records,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "labels": dict(self.labels),
            "ignored_fields": dict(self.ignored),
            "broken": self.broken,
            "num_duplicates": self.repeated,
            "duplicates": self.duplicates,
            "same_structure_other_labels": self.relabelled,
            "checks": self.checks,
        }

    def lines(self) -> list[str]:
        """For the terminal."""
        how = "detected" if self.detected else "as stated"
        derivatives = {"energy", "forces", "stress"} & set(self.labels)
        text = [f"{self.path}: {self.format} ({how})" + (f"; {self.units}" if derivatives else "")]
        lost = "".join(f"; {count} {reason}" for reason, count in self.dropped.items())
        text.append(f"  {self.records} records, {self.kept} kept{lost}")
        labels = ", ".join(
            name if count == self.kept else f"{name} in {count} of {self.kept} only"
            for name, count in self.labels.items()
        )
        text.append(f"  labels: {labels or 'none'}")
        if self.ignored:
            names = ", ".join(f"{name} ({count})" for name, count in self.ignored.most_common(6))
            text.append(f"  not read, though they look like labels: {names}")
        text += [f"  check: {line}" for line in self.checks]
        for title, count, listed in (
            ("broken", self.dropped["broken"], self.broken),
            ("duplicate", self.repeated, self.duplicates),
            ("same structure, other labels (kept)", self.relabelled_count, self.relabelled),
        ):
            text += [f"  {title}: {entry}" for entry in listed[:SHOWN]]
            if count > SHOWN:
                text.append(f"  {title}: and {count - SHOWN} more")
        return text


@dataclass
class IngestReport:
    """All sources, the dataset that was written, and a line on the files of a directory that were not read."""

    out: Path
    sources: list[SourceReport]
    manifest: Manifest
    left_out: str = ""

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "out": str(self.out),
            "digest": self.manifest.digest,
            "structures": self.manifest.num_structures,
            "atoms": self.manifest.num_atoms,
            "sources": [source.summary() for source in self.sources],
            "left_out": self.left_out,
        }

    def lines(self) -> list[str]:
        """For the terminal."""
        size = sum(shard.num_bytes for shard in self.manifest.shards)
        text = [line for source in self.sources for line in source.lines()]
        if self.left_out:
            text.append(self.left_out)
        text.append(
            f"{self.out}: {self.manifest.num_structures} structures, {self.manifest.num_atoms} atoms, "
            f"{len(self.manifest.statistics['elements'])} elements in {len(self.manifest.shards)} shard"
            f"{'s' if len(self.manifest.shards) > 1 else ''}, {size / 1e6:.1f} MB"
        )
        return text

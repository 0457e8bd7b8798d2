"""From source files to a dataset: read, convert, check, filter, tell duplicates, name, write."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpt_hpc import __version__
from dpt_hpc.data.ingest.checks import fault
from dpt_hpc.data.ingest.consistency import Consistency
from dpt_hpc.data.ingest.formats import FORMATS, detect_format, resolve_units, stress_is_stated
from dpt_hpc.data.ingest.json_readers import stated_targets
from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.record import Broken, Record, RecordError
from dpt_hpc.data.ingest.report import IngestReport, SourceReport
from dpt_hpc.data.ingest.sources import find_sources
from dpt_hpc.data.ingest.units import Units, contradiction, convert
from dpt_hpc.data.manifest import sha256_of
from dpt_hpc.data.writing import claim_directory, write_dataset
from dpt_hpc.errors import ConfigError, DataError, did_you_mean
from dpt_hpc.structure import GPA_PER_EV_A3, SYMBOLS, Structure

Progress = Callable[[SourceReport], None] | None
PROGRESS_EVERY = 1000
SHOWN_FAULTS = 5
"""Broken records after which an ingest that refuses them gives up and shows them."""


def ingest(
    sources: Sequence[str | Path],
    out: str | Path,
    options: IngestOptions | None = None,
    progress: Progress = None,
    *,
    origin: Mapping[str, Any] | None = None,
) -> IngestReport:
    """Read `sources` (files, or directories of them) in order, and write a dataset directory `out`.

    progress: called with the report so far, at the start of each source and every thousand records. origin: where the
    sources come from (licence, citation, addresses), for the manifest; it does not change the dataset's digest.

    Raises DataError, naming file and record, for a file that cannot be read, broken records (unless
    `options.skip_broken`), missing required labels, and labels whose units or signs contradict each other; ConfigError
    for options that make no sense. Nothing that looks like a dataset is left then.
    """
    options = options or IngestOptions()
    out = Path(out)
    _check_options(options)
    found_sources = find_sources(sources)
    paths = found_sources.paths
    if not options.targets and options.format in (None, "matdeeplearn"):
        found = [stated_targets(p) for p in paths if (options.format or detect_format(p)) == "matdeeplearn"]
        options = replace(options, targets={name: unit for targets in found for name, unit in targets.items()})
    formats = [options.format or detect_format(path) for path in paths]
    units = [resolve_units(name, options) for name in formats]
    claim_directory(out)
    provenance: dict[str, Any] = {"dpt_hpc": __version__, "options": _stated(options)}
    reports = [
        SourceReport(path, name, options.format is None, str(stated), sha256_of(path))
        for path, name, stated in zip(paths, formats, units, strict=True)
    ]
    provenance["sources"] = [{"file": r.path.name, "sha256": r.sha256} for r in reports]
    if left_out := found_sources.left_out_line():
        provenance["left_out"] = left_out

    def structures() -> Iterator[Structure]:
        intake = Intake(options)
        for report, stated in zip(reports, units, strict=True):
            yield from intake.take(report, stated, progress)
        provenance["sources"] = [report.summary() for report in reports]
        provenance.update(origin or {})
        provenance["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")

    manifest = write_dataset(
        structures(),
        out,
        provenance=provenance,
        property_units=options.targets,
        shard_atoms=options.shard_atoms,
        dtype=options.dtype,
        compression=options.compression,
    )
    return IngestReport(out, reports, manifest, left_out)


def _check_options(options: IngestOptions) -> None:
    if options.format is not None and options.format not in FORMATS:
        near = did_you_mean(options.format, FORMATS)
        raise ConfigError(f"--format is {options.format!r}, expected one of {', '.join(FORMATS)}.{near}")
    if options.stride < 1:
        raise ConfigError(f"--stride is {options.stride}, expected 1 or more.")
    for name, unit in options.targets.items():
        if not unit:
            raise ConfigError(
                f"target {name}: its unit is missing.\nWrite --target {name}=UNIT (1 for a plain number)."
            )
    known = {"energy", "forces", "stress", *options.targets}
    if unknown := [name for name in options.require if name not in known]:
        near = did_you_mean(unknown[0], known)
        raise ConfigError(f"--require names {unknown[0]!r}, expected among {', '.join(sorted(known))}.{near}")


def _stated(options: IngestOptions) -> dict[str, Any]:
    """The options that differ from their defaults."""
    default = IngestOptions()
    return {f.name: v for f in fields(options) if (v := getattr(options, f.name)) != getattr(default, f.name)}


class Intake:
    """What is remembered from record to record: ids, digests of structures, and the numbers for the unit checks.

    About 300 bytes a structure, whatever its size.
    """

    def __init__(self, options: IngestOptions) -> None:
        self.options = options
        self.ids: set[int] = set()
        self.seen: dict[int, tuple[int, int]] = {}
        self.geometries: set[int] = set()
        self.files: list[str] = []

    def take(self, report: SourceReport, units: Units, progress: Progress = None) -> Iterator[Structure]:
        """The structures of one source that are to be written, in order."""
        number = len(self.files)
        self.files.append(report.path.name)
        consistency = Consistency(report.path, units)
        faults: list[str] = []
        fields: set[str] = set()
        lost = False
        for record in FORMATS[report.format].reader(report.path, self.options):
            if progress is not None and report.records % PROGRESS_EVERY == 0:
                progress(report)
            report.records += 1
            lost = isinstance(record, Broken) and record.rest_lost
            if isinstance(record, Record):
                fields.update(record.fields)
            if not lost and (report.records - 1) % self.options.stride:
                report.dropped["passed over by the stride"] += 1
                continue
            if isinstance(record, Broken) or (reason := self._prepare(record, report, units)) is not None:
                reason = record.reason if isinstance(record, Broken) else reason
                faults.append(f"{record.name}: {reason}")
                report.dropped["broken"] += 1
                report.name(faults[-1], report.broken)
                if not self.options.skip_broken and len(faults) == SHOWN_FAULTS:
                    break
                continue
            if self._repeats(record, number, report):
                continue
            if (filtered := self._filter(record)) is not None:
                report.dropped[filtered] += 1
                continue
            report.labels.update(_labels_of(record))
            report.ignored.update(record.ignored)
            report.kept += 1
            structure = self._structure(record, report.path)
            if self.options.check:
                consistency.show(structure)
            yield structure
            if self.options.limit is not None and report.kept >= self.options.limit:
                break
        self._conclude(report, faults, lost)
        self._check_keys(report, fields)
        if self.options.check:
            report.checks += consistency.conclude()

    def _prepare(self, record: Record, report: SourceReport, units: Units) -> str | None:
        """Convert a record's labels; the reason why it is broken, or None."""
        if (record.stress is not None) and not stress_is_stated(report.format, self.options):
            raise DataError(
                f"{report.path}: {record.name}: has a stress, but {report.format} files state no unit or sign.\n"
                "State them: --stress-unit eV/A^3|GPa|kbar --stress-sign tension_positive|compression_positive "
                "(VASP's output: kbar, compression_positive)."
            )
        if (reason := contradiction(record.stated_units, units, self.options)) is not None:
            return reason
        try:
            convert(record, units)
        except RecordError as error:
            return str(error)
        if (reason := fault(record)) is not None:
            return reason
        present = _labels_of(record)
        missing = [name for name in self.options.require if name not in present]
        return f"{', '.join(missing)} missing, but required" if missing else None

    def _filter(self, record: Record) -> str | None:
        """The filter that a record fails, with its limit."""
        options, n = self.options, len(record.numbers)
        if n < options.min_atoms:
            return f"under {options.min_atoms} atoms"
        if options.max_atoms is not None and n > options.max_atoms:
            return f"over {options.max_atoms} atoms"
        if (
            options.max_force is not None
            and record.forces is not None
            and np.abs(record.forces).max() > options.max_force
        ):
            return f"with a force component over {options.max_force:g} eV/Å"
        if options.max_stress is not None and record.stress is not None:
            largest = float(np.abs(record.stress).max()) * GPA_PER_EV_A3
            if largest > options.max_stress:
                return f"with a stress component over {options.max_stress:g} GPa"
        return None

    def _repeats(self, record: Record, number: int, report: SourceReport) -> bool:
        """Whether an earlier record has this structure and these labels; then it is reported and left out."""
        geometry, whole = digests(record)
        place = f"{report.path.name}: {record.name}"
        earlier = self.seen.get(whole)
        if earlier is not None:
            report.repeated += 1
            report.name(f"{place} repeats record {earlier[1]} of {self.files[earlier[0]]}", report.duplicates)
            if not self.options.keep_duplicates:
                report.dropped["duplicate"] += 1
                return True
        else:
            self.seen[whole] = (number, report.records - 1)
            if geometry in self.geometries:
                report.relabelled_count += 1
                report.name(place, report.relabelled)
        self.geometries.add(geometry)
        return False

    def _structure(self, record: Record, path: Path) -> Structure:
        stem = path.name.partition(".")[0]
        ordinal = record.name.removeprefix("record ").partition(" ")[0]
        choices = [record.structure_id] if record.structure_id else []
        choices += [f"{stem}:{record.structure_id or ordinal}", f"{stem}:{record.structure_id}#{ordinal}"]
        choices += [f"{path.parent.name}/{choices[-1]}", f"{path.parent.name}/{choices[-1]}@{len(self.ids)}"]
        name = next(c for c in choices if _hash(c.encode()) not in self.ids)
        self.ids.add(_hash(name.encode()))

        def tensor(values: Any) -> torch.Tensor | None:
            return None if values is None else torch.tensor(np.asarray(values), dtype=torch.float64)

        return Structure(
            positions=torch.tensor(record.positions, dtype=torch.float64),
            cell=torch.tensor(record.cell, dtype=torch.float64),
            pbc=torch.tensor(record.pbc, dtype=torch.bool),
            atomic_numbers=torch.tensor(record.numbers, dtype=torch.int64),
            energy=record.energy,
            forces=tensor(record.forces),
            stress=tensor(record.stress),
            properties=record.properties,
            structure_id=name,
            group=record.group or reduced_formula(record.numbers),
        )

    def _check_keys(self, report: SourceReport, fields: set[str]) -> None:
        """Refuse a key for ids or groups that no record has."""
        for option, key in (("--id-key", self.options.id_key), ("--group-key", self.options.group_key)):
            if key is None or key in fields or not report.kept:
                continue
            alike = difflib.get_close_matches(key, fields, 1, cutoff=0.0)
            shown = [*alike, *sorted(fields - set(alike))][:8]
            raise DataError(
                f"{report.path}: {option} is {key!r}, but none of its {report.records} records has such a field"
                + (f"; they have {', '.join(shown)}{' ...' if len(fields) > len(shown) else ''}.\n" if shown else ".\n")
                + (f"Name one that is there, or leave {option} out." if shown else f"Leave {option} out for this file.")
            )

    def _conclude(self, report: SourceReport, faults: list[str], lost: bool) -> None:
        if lost:
            shown = faults[-SHOWN_FAULTS:]
            raise DataError(
                f"{report.path}: the file cannot be read to its end:\n  " + "\n  ".join(shown) + "\n"
                "Mend it, or get it again: --skip-broken leaves out single records, not the rest of a file."
            )
        if faults and not self.options.skip_broken:
            more = "at least " if len(faults) == SHOWN_FAULTS else ""
            raise DataError(
                f"{report.path}: {more}{len(faults)} broken record{'s' if len(faults) > 1 else ''} "
                f"among the first {report.records}:\n  " + "\n  ".join(faults) + "\n"
                "Mend them, or leave them out with --skip-broken (they are counted and listed in dataset.json)."
            )
        if report.kept and not report.labels and report.ignored:
            names = ", ".join(list(report.ignored)[:6])
            raise DataError(
                f"{report.path}: no label was read, but its records have {names}.\n"
                "Say what they are: --target NAME=UNIT for a property; --energy-key, --forces-key or --stress-key."
            )


def _labels_of(record: Record) -> list[str]:
    found = [label for label in ("energy", "forces", "stress") if getattr(record, label) is not None]
    return [*found, *record.properties]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def digests(record: Record) -> tuple[int, int]:
    """64-bit digests of the geometry, and of geometry and labels, rounded to 1e-5 in their units."""

    def rounded(values: Any) -> bytes:
        return (np.round(np.asarray(values, dtype=np.float64), 5) + 0.0).tobytes()

    kinds, pbc = np.asarray(record.numbers, dtype=np.int64), np.asarray(record.pbc, dtype=bool)
    geometry = kinds.tobytes() + pbc.tobytes() + rounded(record.positions) + rounded(record.cell)
    labels = [record.energy, record.forces, record.stress, *(record.properties[k] for k in sorted(record.properties))]
    text = b"|".join(b"" if v is None else rounded(v) for v in labels)
    return _hash(geometry), _hash(geometry + b"|" + text)


def reduced_formula(numbers: Any) -> str:
    """Chemical formula divided by the greatest common divisor of its counts, elements in alphabetical order."""
    kinds, counts = np.unique(numbers, return_counts=True)
    divisor = math.gcd(*counts.tolist())
    parts = sorted((SYMBOLS[z], c // divisor) for z, c in zip(kinds.tolist(), counts.tolist(), strict=True))
    return "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in parts)

"""What a dataset holds, to look at: counts, elements, label ranges, small histograms, where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dpt_hpc.data.manifest import Manifest
from dpt_hpc.data.shards import Dataset

BARS = "▁▂▃▄▅▆▇█"
BINS = 24
OUTLIERS = 0.005
"""The histogram leaves out this part of the values at either end, which the range shows."""
SAMPLE_ATOMS = 5_000_000
"""Larger datasets: histograms of evenly chosen shards with about so many atoms; ranges and counts are always of all."""


@dataclass(frozen=True)
class Column:
    """Range of one quantity over the dataset, and its histogram: counts in equal steps from low to high."""

    name: str
    unit: str
    count: int
    minimum: float
    mean: float
    maximum: float
    low: float
    high: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class DatasetSummary:
    """What `dpt-hpc inspect` shows; `as_json` gives the same to programs."""

    path: str
    num_structures: int
    num_atoms: int
    num_groups: int
    num_edges_estimated: int
    num_bytes: int
    num_shards: int
    digest: str
    labels: Mapping[str, int]
    elements: Mapping[str, Mapping[str, int]]
    columns: tuple[Column, ...]
    provenance: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect_dataset(path: str | Path, *, verify: bool = True) -> DatasetSummary:
    """Summarise one dataset directory; every hash is checked unless `verify` is False.

    Raises DataError as `Dataset.open` does.
    """
    dataset = Dataset.open(path, verify=verify)
    manifest = dataset.manifests[0]
    ranges = manifest.statistics["ranges"]
    properties = {
        name: int(ranges.get(f"properties/{name}", {"count": 0})["count"]) for name in manifest.property_units
    }
    return DatasetSummary(
        path=str(path),
        num_structures=manifest.num_structures,
        num_atoms=manifest.num_atoms,
        num_groups=len(np.unique(dataset.groups)),
        num_edges_estimated=int(dataset.edge_estimate.sum()),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        num_shards=len(manifest.shards),
        digest=manifest.digest,
        labels={**manifest.statistics["labels"], **properties},
        elements=manifest.statistics["elements"],
        columns=tuple(_columns(_sample(Path(path), manifest), manifest)),
        provenance=manifest.provenance,
    )


def _sample(path: Path, manifest: Manifest) -> Dataset:
    stride = -(-manifest.num_atoms // SAMPLE_ATOMS)
    return Dataset([path], [replace(manifest, shards=manifest.shards[::stride])])


def _columns(sample: Dataset, manifest: Manifest) -> list[Column]:
    ranges = manifest.statistics["ranges"]
    batch, atoms = sample.read(np.arange(len(sample))), sample.num_atoms
    columns = [
        _column("atoms", "", atoms, ranges["num_atoms"]),
        _column("volume per atom", "Å³", batch.volume.numpy() / atoms, ranges["volume_per_atom"]),
    ]
    if "energy_per_atom" in ranges:
        values = (batch.energy.numpy() / atoms)[sample.has_energy]
        columns.append(_column("energy per atom", "eV", values, ranges["energy_per_atom"]))
    if "forces" in ranges:
        values = batch.forces.numpy()[np.repeat(sample.has_forces, atoms)]
        columns.append(_column("force components", "eV/Å", values, ranges["forces"]))
    if "stress" in ranges:
        stress = batch.stress.numpy()[sample.has_stress]
        columns.append(_column("stress components", "eV/Å³", stress, ranges["stress"]))
    for name, unit in manifest.property_units.items():
        if f"properties/{name}" in ranges:
            values = sample.property_values(name)
            columns.append(_column(name, unit, values[np.isfinite(values)], ranges[f"properties/{name}"]))
    return columns


def _column(name: str, unit: str, values: NDArray[Any], total: Mapping[str, float]) -> Column:
    low, high = np.quantile(values, (OUTLIERS, 1 - OUTLIERS)) if values.size else (0.0, 1.0)
    counts, _ = np.histogram(values, bins=BINS, range=(float(low), float(high)))
    return Column(
        name,
        unit,
        int(total["count"]),
        total["min"],
        total["mean"],
        total["max"],
        float(low),
        float(high),
        tuple(counts.tolist()),
    )


def bars(histogram: tuple[int, ...]) -> str:
    """A histogram as one line of block characters; what is not empty can be seen."""
    top = max(max(histogram), 1)
    return "".join(" " if n == 0 else BARS[round(n / top * (len(BARS) - 1))] for n in histogram)


def render_summary(summary: DatasetSummary) -> RenderableType:
    """The summary for a terminal of at least 100 columns."""
    head = Text(
        f"{summary.path}: {summary.num_structures:,} structures of {summary.num_groups:,} groups, "
        f"{summary.num_atoms:,} atoms, about {summary.num_edges_estimated:,} edges within 8 Å\n"
        f"{summary.num_shards} shard{'s' if summary.num_shards > 1 else ''}, {summary.num_bytes / 1e6:.1f} MB, "
        f"digest {summary.digest[:16]}\n"
        "labels: " + ", ".join(f"{name} {count:,}" for name, count in summary.labels.items() if count)
    )
    if not any(summary.labels.values()):
        head.append("none")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "unit", "min", "mean", "max"):
        table.add_column(title, justify="left" if title in ("", "unit") else "right")
    table.add_column("histogram (99 % of the values)", no_wrap=True)
    for c in summary.columns:
        numbers = (f"{value:.4g}" for value in (c.minimum, c.mean, c.maximum))
        table.add_row(c.name, c.unit, *numbers, f"{c.low:9.3g} {bars(c.histogram)} {c.high:.3g}")
    return Group(head, Text(), table, Text(), _elements(summary), Text(), _origin(summary))


def _elements(summary: DatasetSummary) -> Text:
    ranked = sorted(summary.elements.items(), key=lambda item: -item[1]["structures"])
    words = " ".join(f"{symbol} {count['structures']:,}" for symbol, count in ranked)
    return Text(f"{len(ranked)} elements, by number of structures: {words}")


def _origin(summary: DatasetSummary) -> Text:
    lines = origin_lines(summary.provenance)
    for source in summary.provenance.get("sources", []):
        dropped = "".join(f"; {count:,} {reason}" for reason, count in source.get("dropped", {}).items())
        lines.append(
            f"from {source['file']} ({source.get('format', 'unknown format')}): "
            f"{source.get('kept', 0):,} of {source.get('records', 0):,} records{dropped}"
        )
        lines += [f"  check: {line}" for line in source.get("checks", [])]
    return Text("\n".join(lines) or "of unknown origin")


def origin_lines(provenance: Mapping[str, Any]) -> list[str]:
    """What a dataset says of its licence, citation and raw files; nothing if it was not made of the catalog."""
    lines = [f"{word}: {provenance[key]}" for word, key in WORDS.items() if key in provenance]
    for file in provenance.get("raw_files", []):
        known = "" if file["verified"] else ", not verified"
        lines.append(f"file {file['file']}: sha256 {file['sha256']}{known}; {file['url'] or 'no public address'}")
    return lines


WORDS = {"catalog": "catalog", "licence": "licence", "cite": "citation"}

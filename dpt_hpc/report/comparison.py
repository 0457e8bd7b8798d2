"""Fine-tunings beside each other, beside their baseline, and beside the paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpt_hpc.report.paper import (
    DENOISING_STRUCTURES,
    PRETRAINING_STRUCTURES,
    PROTOCOL,
    PaperReference,
    look_up,
    pretraining_row,
    same_size,
    same_unit,
)
from dpt_hpc.report.runs import FineTuning, Run, find_run, load_run, run_behind
from dpt_hpc.report.summary import dataset_name, network_name, objective_name, seed_errors, target_of, unit_of
from dpt_hpc.report.wording import NO_BREAK, count, listing


@dataclass(frozen=True)
class Start:
    """What a fine-tuning started from: in words, the paper's name of it, and its length and amount of data."""

    words: str
    row: str | None
    epochs: int | None = None
    structures: int | None = None


@dataclass(frozen=True)
class Entry:
    """A row of the table. Errors in the group's unit; improvements in % of the baseline's mean, positive is better.

    wins: seeds, of those that both have, in which it beats the baseline. paper: MAE and table number.
    """

    tuning: FineTuning
    start: Start
    errors: Mapping[int, float]
    mean: float | None
    std: float | None
    improvement: float | None
    wins: tuple[int, int] | None
    paper: tuple[float, int] | None
    paper_improvement: float | None


@dataclass(frozen=True)
class Group:
    """Fine-tunings that may be compared: same data, property, network and pooling."""

    title: str
    unit: str
    entries: tuple[Entry, ...]
    reference: PaperReference | None
    notes: tuple[str, ...]

    @property
    def scale(self) -> tuple[float, float]:
        """Limits of an axis that holds all errors and the paper's."""
        values = [v for e in self.entries for v in e.errors.values() if math.isfinite(v)]
        values += [e.paper[0] for e in self.entries if e.paper]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return low - margin, high + margin


def verdict(entry: Entry) -> str:
    """One sentence on how an entry compares with its baseline and with the paper; "" if with neither."""
    if entry.start.row == "baseline":
        return f"The paper's baseline: {entry.paper[0]:g} (Table {entry.paper[1]})." if entry.paper else ""
    if entry.improvement is None:
        return ""
    size = f"{abs(entry.improvement):.1f}{NO_BREAK}%"
    words = f"That is {size} {'better' if entry.improvement > 0 else 'worse'} than without pre-training"
    if entry.paper_improvement is None:
        return f"{words}."
    theirs = f"{abs(entry.paper_improvement):.1f}{NO_BREAK}%"
    return f"{words}; in the paper it is {theirs} {'better' if entry.paper_improvement > 0 else 'worse'}."


def start_of(tuning: FineTuning, others: Sequence[Run]) -> Start:
    """Where the weights came from; `others` are runs of this report, looked through before the disk."""
    first = tuning.runs[0]
    path = first.config.get("pretrained") or first.environment.get("pretrained_from")
    path = path or tuning.results.get("pretrained_from")
    if not path:
        return Start("not pre-trained", "baseline")
    noted = first.environment.get("pretrained")
    noted = noted if isinstance(noted, Mapping) else {}
    folder = find_run(str(path), tuning.path)
    run = next((r for r in others if r.path == folder), None)
    if run is None and folder is not None:
        run = load_run(folder, folder.name)
    if run is None and noted.get("trained_on"):
        run = run_behind(str(path), noted)
    if run is None:
        label = tuning.results.get("pretraining")
        return Start(f"pre-trained ({label or path})", str(label) if label else None)
    epochs = first.config.get("pretrained_epochs") or run.last_epoch
    structures = run.split.get("train") or sum(s.structures or 0 for s in run.sources) or None
    size = f", {count(structures, 'structure')}" if structures else ""
    words = f"pre-trained by {run.name}: {objective_name(run)}, {count(epochs, 'epoch')}{size}"
    return Start(words, pretraining_row(run.objective), epochs, structures)


def compare(tunings: Sequence[FineTuning], others: Sequence[Run]) -> list[Group]:
    """Group fine-tunings by what they learn and set each beside its baseline and the paper's number."""
    groups: dict[tuple[str, str, str, str], list[FineTuning]] = {}
    for tuning in tunings:
        first = tuning.runs[0]
        groups.setdefault((dataset_name(first), target_of(first), first.network, pooling_of(tuning)), []).append(tuning)
    return [_group(key, members, others) for key, members in groups.items()]


def pooling_of(tuning: FineTuning) -> str:
    """add or mean."""
    model = tuning.runs[0].config.get("model")
    configured = model.get("pooling") if isinstance(model, Mapping) else None
    return str(configured or tuning.results.get("pooling") or "add")


def _group(key: tuple[str, str, str, str], members: Sequence[FineTuning], others: Sequence[Run]) -> Group:
    dataset, target, network, pooling = key
    unit = next((u for u in (str(m.results.get("unit") or "") or unit_of(m.runs[0]) for m in members) if u), "")
    reference, notes = _paper(dataset, network, pooling, unit, members)
    starts = [start_of(m, others) for m in members]
    baseline = next((seed_errors(m) for m, s in zip(members, starts, strict=True) if s.row == "baseline"), {})
    entries = [_entry(m, s, baseline, reference) for m, s in zip(members, starts, strict=True)]
    entries.sort(key=lambda e: e.start.row != "baseline")
    if reference is not None:
        notes += _protocol(members)
    pretrained = [s for s in starts if s.row != "baseline"]
    if reference is not None and pretrained:
        sizes = sorted({s.structures for s in pretrained if s.structures})
        here = listing([f"{n:,}" for n in sizes]) or "a number that is not known"
        notes.append(
            f"The paper's pre-trained rows were pre-trained on {PRETRAINING_STRUCTURES:,} structures (denoising: "
            f"{DENOISING_STRUCTURES:,}), those of this report on {here}: compare the improvements, not the errors."
        )
    title = f"{target.replace('_', ' ')} of {dataset}, {network_name(network)}, {pooling} pooling"
    return Group(title[:1].upper() + title[1:], unit, tuple(entries), reference, tuple(notes))


def _entry(tuning: FineTuning, start: Start, baseline: Mapping[int, float], reference: PaperReference | None) -> Entry:
    errors = seed_errors(tuning)
    finite = [v for v in errors.values() if math.isfinite(v)]
    mean = statistics.fmean(errors.values()) if errors else None
    std = statistics.stdev(finite) if len(finite) > 1 and len(finite) == len(errors) else None
    improvement = wins = None
    if start.row != "baseline" and baseline and mean is not None:
        base = statistics.fmean(baseline.values())
        improvement = 100 * (base - mean) / base if base else None
        shared = errors.keys() & baseline.keys()
        wins = (sum(errors[s] < baseline[s] for s in shared), len(shared)) if shared else None
    paper = reference.of(start.row, start.epochs) if reference and start.row else None
    paper_improvement = None
    if reference and paper and start.row != "baseline":
        paper_improvement = 100 * (reference.baseline - paper[0]) / reference.baseline
    return Entry(tuning, start, errors, mean, std, improvement, wins, paper, paper_improvement)


def _paper(
    dataset: str, network: str, pooling: str, unit: str, members: Sequence[FineTuning]
) -> tuple[PaperReference | None, list[str]]:
    """The paper's numbers, where they are of the same structures in the same unit; else why not."""
    reference = look_up(dataset, network, pooling)
    if reference is None:
        return None, []
    theirs = reference.dataset
    sizes = {sum(s.structures or 0 for s in m.runs[0].sources) or sum(m.runs[0].split.values()) for m in members}
    size = max(sizes)
    if size and not same_size(size, theirs):
        return None, [
            f"The paper's {theirs.column} has {theirs.structures:,} structures, this dataset has {size:,}: "
            "their errors are not comparable, and the paper's are not shown."
        ]
    if not same_unit(unit, theirs):
        return None, [
            f"The paper's {theirs.column} has the unit {theirs.unit or '1'}, this dataset {unit or 'none'}: "
            "the paper's errors are not shown."
        ]
    notes = []
    if size and size != theirs.structures:
        notes.append(f"{size:,} of the paper's {theirs.structures:,} structures.")
    return reference, notes


def _protocol(members: Sequence[FineTuning]) -> list[str]:
    """Where these fine-tunings depart from the paper's: a comparison must say so."""
    departures = []
    seeds = {m.expected for m in members}
    if seeds != {PROTOCOL.seeds}:
        departures.append(f"{_each(seeds)} {'seed' if seeds == {1} else 'seeds'} instead of {PROTOCOL.seeds}")
    epochs = {m.runs[0].total_epochs or m.runs[0].last_epoch for m in members}
    if epochs != {PROTOCOL.epochs}:
        departures.append(f"{_each(epochs)} epochs instead of {PROTOCOL.epochs}")
    splits = {_split(m.runs[0].config) for m in members}
    for fractions, by in sorted(splits):
        if fractions and fractions != PROTOCOL.split:
            text = "/".join(f"{f:g}" for f in fractions)
            departures.append(f"a split of {text} instead of {'/'.join(f'{f:g}' for f in PROTOCOL.split)}")
        if by == "group":
            departures.append("a split by material instead of a random one")
    if not departures:
        return ["Same protocol as the paper's: 5 seeds, 200 epochs, random split 0.6/0.2/0.2."]
    return [f"Departures from the paper's protocol: {'; '.join(dict.fromkeys(departures))}."]


def _each(numbers: set[int]) -> str:
    return " or ".join(str(n) for n in sorted(numbers))


def _split(config: Mapping[str, Any]) -> tuple[tuple[float, ...], str]:
    data = config.get("data")
    split = data.get("split") if isinstance(data, Mapping) else None
    if not isinstance(split, Mapping):
        return (), ""
    fractions = tuple(
        float(split[k]) for k in ("train", "validation", "test") if isinstance(split.get(k), (int, float))
    )
    return fractions, str(split.get("by", ""))


def strip(entry: Entry, group: Group) -> str:
    """A small drawing of one row's errors on the group's scale: dots are seeds, the bar their mean, the ring the
    paper's number. Numbers only: nothing of a user's text enters it."""
    low, high = group.scale
    width, height = 168.0, 22.0

    def place(value: float) -> float:
        return 6 + (width - 12) * (value - low) / (high - low)

    finite = [v for v in entry.errors.values() if math.isfinite(v)]
    marks = [f'<circle class="seed" cx="{place(v):.1f}" cy="11" r="3.2"/>' for v in finite]
    words = ["seeds " + ", ".join(f"{v:.4g}" for v in finite)] if finite else ["no seed finished"]
    if finite:
        mean = place(statistics.fmean(finite))
        marks.append(f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="2" y2="20"/>')
    if entry.paper:
        marks.append(f'<circle class="paper" cx="{place(entry.paper[0]):.1f}" cy="11" r="5"/>')
        words.append(f"paper {entry.paper[0]:g}")
    axis = f'<line class="axis" x1="0" x2="{width:g}" y1="11" y2="11"/>'
    label = "; ".join(words)
    return (
        f'<svg class="strip" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{axis}{''.join(marks)}</svg>"
    )

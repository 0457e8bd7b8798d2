"""The page: what the sections show, put into the template."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dpt_hpc import __version__
from dpt_hpc.report import wording
from dpt_hpc.report.comparison import Group, compare, start_of, strip, verdict
from dpt_hpc.report.origin import origin
from dpt_hpc.report.runs import FineTuning, Run, Source, load_runs
from dpt_hpc.report.sections import accuracy_figures, elements, worst
from dpt_hpc.report.summary import (
    best_epoch,
    dataset_name,
    error_rows,
    network_name,
    objective_name,
    outcome,
    state_of,
    subject,
    target_of,
    tuning_sentences,
    unit_of,
)
from dpt_hpc.report.training import compared_curves, learning_rate, training_curves, waiting

Section = dict[str, Any]


def write_page(paths: Sequence[Path], out: Path) -> Path:
    """See dpt_hpc.report.write_report."""
    html = render(load_runs([Path(p) for p in paths]))
    out = Path(out)
    if out.is_dir():
        out = out / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}")
    temporary.write_bytes(html.encode("utf-8", errors="replace"))
    os.replace(temporary, out)
    return out


def render(runs: Sequence[Run | FineTuning], now: datetime | None = None) -> str:
    """The page as text. Everything that comes from a run is escaped by the template."""
    now = now or datetime.now(timezone.utc)
    single = [run for run in runs if isinstance(run, Run)]
    tunings = [run for run in runs if isinstance(run, FineTuning)]
    pretrainings = [run for run in single if run.task != "evaluate"]
    groups = compare(tunings, single)
    verdicts = {entry.tuning.path: verdict(entry) for group in groups for entry in group.entries}
    sections = [
        _tuning_section(run, i, single, verdicts[run.path]) if isinstance(run, FineTuning) else _run_section(run, i)
        for i, run in enumerate(runs)
    ]
    anchors = {run.path: section["anchor"] for run, section in zip(runs, sections, strict=True)}
    text = _template().render(
        title=_title(runs),
        made=wording.moment(now.isoformat()),
        version=__version__,
        sections=sections,
        groups=[_group(group, anchors) for group in groups],
        pretraining=_pretraining_table(pretrainings, anchors),
        overlays=compared_curves(pretrainings),
        sources=_sources(runs),
        style=Markup(_resource("style.css")),
    )
    return "".join(c if c.isprintable() or c in "\n\t" or c > "\x7f" else "\ufffd" for c in text)


def _resource(name: str) -> str:
    return resources.files("dpt_hpc.report").joinpath(name).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=wording.number, integer=wording.integer, percent=wording.percent, quantity=wording.quantity
    )
    return environment.from_string(_resource("page.html"))


def _title(runs: Sequence[Run | FineTuning]) -> str:
    if len(runs) == 1:
        run = runs[0]
        first = run if isinstance(run, Run) else run.runs[0]
        what = {"pretrain": "Pre-training", "finetune": "Fine-tuning", "evaluate": "Evaluation"}.get(
            first.task, "Training"
        )
        return f"{what} of {network_name(first.network)} on {dataset_name(first)}"
    tunings = sum(isinstance(run, FineTuning) for run in runs)
    evaluations = sum(isinstance(run, Run) and run.task == "evaluate" for run in runs)
    kinds = [
        (len(runs) - tunings - evaluations, "pre-training"),
        (tunings, "fine-tuning"),
        (evaluations, "evaluation"),
    ]
    return wording.listing([wording.count(n, kind) for n, kind in kinds if n]).capitalize()


def _run_section(run: Run, index: int) -> Section:
    key = f"r{index}"
    predictions = [run.predictions] if run.predictions else []
    return {
        "anchor": f"run-{index}",
        "name": run.name,
        "path": str(run.path),
        "kind": {"pretrain": "Pre-training", "evaluate": "Evaluation"}.get(run.task, "Training"),
        "state": state_of(run),
        "finished": run.finished,
        "subject": subject(run),
        "outcome": outcome(run),
        "warnings": _warnings([run]),
        "errors": [_error_row(row) for row in error_rows(run)],
        "part": run.predictions.part if run.predictions else None,
        "seeds": [],
        "curves": [*training_curves([run], key), *learning_rate([run], key), *waiting([run], key)],
        "parity": accuracy_figures(predictions, run, key),
        "elements": elements(predictions, run),
        "worst": worst(predictions, run),
        "config": wording.flat(run.config),
        "command": run.environment.get("command"),
        "environment": _environment(run),
    }


def _tuning_section(tuning: FineTuning, index: int, others: Sequence[Run], compared: str) -> Section:
    first, key = tuning.runs[0], f"r{index}"
    predictions = [run.predictions for run in tuning.runs if run.predictions]
    unit = str(tuning.results.get("unit") or "") or unit_of(first)
    about, result = tuning_sentences(tuning, unit, start_of(tuning, others).words)
    rows = []
    for seed, run in tuning.seeds:
        row = next(iter(error_rows(run)), None)
        rows.append(
            {
                "seed": seed,
                "state": state_of(run),
                "best_epoch": (best_epoch(run) or {}).get("epoch"),
                "validation": wording.number(row.best if row else None),
                "test": wording.number(row.test if row else None),
            }
        )
    return {
        "anchor": f"run-{index}",
        "name": tuning.name,
        "path": str(tuning.path),
        "kind": "Fine-tuning",
        "state": state_of(tuning),
        "finished": tuning.finished,
        "subject": about,
        "outcome": f"{result} {compared}".strip(),
        "warnings": _warnings(tuning.runs),
        "errors": [],
        "part": predictions[0].part if predictions else None,
        "seeds": rows,
        "seed_unit": unit,
        "target": target_of(first),
        "curves": [*training_curves(tuning.runs, key), *learning_rate(tuning.runs, key), *waiting(tuning.runs, key)],
        "parity": accuracy_figures(predictions, first, key),
        "elements": elements(predictions, first),
        "worst": worst(predictions, first),
        "config": wording.flat(first.config),
        "command": first.environment.get("command"),
        "environment": _environment(first),
    }


def _error_row(row: Any) -> Section:
    q, detail = row.quantity, row.detail
    scale = q.error_factor
    return {
        "name": q.name,
        "unit": q.error_unit,
        "before": wording.number(row.before),
        "best": wording.number(row.best),
        "test": wording.number(row.test),
        "rmse": wording.number(detail.rmse * scale) if detail else "—",
        "r2": wording.r_squared(detail.r2) if detail else "—",
        "spread": wording.number(detail.spread * scale) if detail else "—",
    }


def _warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know, each once, with the seeds that it concerns."""
    found: dict[str, list[str]] = {}
    for run in runs:
        said = [f"The dataset at {s.path} has changed since this run." for s in run.sources if s.changed]
        if run.cut:
            said.append("The last line of metrics.jsonl is incomplete and was left out.")
        if run.predictions is None and run.finished:
            said.append("There is no predictions_<part>.npz, so no parity plots and no errors by element.")
        if run.predictions is not None and run.predictions.part != "test":
            said.append(f"No predictions for the test part: those for the {run.predictions.part} part are shown.")
        for text in said:
            found.setdefault(text, []).append(run.path.name)
    return [text + (f" ({', '.join(names)})" if len(names) < len(runs) else "") for text, names in found.items()]


def _environment(run: Run) -> list[tuple[str, str]]:
    hidden = ("command", "dataset")
    shown = {key: value for key, value in run.environment.items() if key not in hidden}
    for key in ("started", "finished"):
        if key in shown:
            shown[key] = wording.moment(shown[key])
    if "wall_seconds" in shown:
        shown["wall time"] = wording.duration(shown.pop("wall_seconds"))
    return wording.flat(shown)


def _group(group: Group, anchors: Mapping[Path, str]) -> Section:
    rows = []
    for entry in group.entries:
        mean, std = wording.mean_and_std(entry.mean, entry.std)
        rows.append(
            {
                "name": entry.tuning.name,
                "anchor": anchors[entry.tuning.path],
                "start": entry.start.words,
                "seeds": f"{len(entry.errors)} of {max(entry.tuning.expected, len(entry.errors))}",
                "mean": mean,
                "std": std if entry.std is not None else None,
                "strip": Markup(strip(entry, group)),
                "improvement": wording.percent(entry.improvement, 1),
                "wins": entry.wins,
                "paper": f"{entry.paper[0]:g}" if entry.paper else "—",
                "table": entry.paper[1] if entry.paper else None,
                "paper_improvement": wording.percent(entry.paper_improvement, 1),
            }
        )
    low, high = group.scale
    return {
        "title": group.title,
        "unit": group.unit,
        "rows": rows,
        "paper": group.reference is not None,
        "notes": group.notes,
        "low": wording.number(low, 2),
        "high": wording.number(high, 2),
    }


def _pretraining_table(runs: Sequence[Run], anchors: Mapping[Path, str]) -> Section | None:
    """Errors of several pre-training runs side by side: a column for every label that one of them reports."""
    if len(runs) < 2:
        return None
    tables = [{row.quantity: row for row in error_rows(run)} for run in runs]
    columns = list(dict.fromkeys(q for table in tables for q in table))
    rows = []
    for run, table in zip(runs, tables, strict=True):
        cells = []
        for row in (table.get(q) for q in columns):
            value = row and (row.best if row.test is None else row.test)
            cells.append({"text": wording.number(value), "validation": row is not None and row.test is None})
        facts = {"network": network_name(run.network), "objective": objective_name(run), "data": dataset_name(run)}
        rows.append({"name": run.name, "anchor": anchors[run.path], "epochs": run.last_epoch, "cells": cells, **facts})
    return {"columns": [{"name": q.name, "unit": q.error_unit} for q in columns], "rows": rows}


def _sources(runs: Sequence[Run | FineTuning]) -> list[Section]:
    """Every dataset once, with what its manifest says of its origin."""
    found: dict[tuple[str, str | None], tuple[Source, list[str]]] = {}
    for run in runs:
        first = run if isinstance(run, Run) else run.runs[0]
        for source in first.sources:
            found.setdefault((source.path, source.digest), (source, []))[1].append(run.name)
    return [
        {
            "name": source.name,
            "path": source.path,
            "structures": wording.integer(source.structures or source.manifest.get("num_structures")),
            "digest": str(source.digest or source.manifest.get("digest") or ""),
            "used_by": wording.listing(users),
            "found": bool(source.manifest),
            **origin(source.manifest),
        }
        for source, users in found.values()
    ]

"""What a suite's run directories hold, as tables and as one JSON file per cell."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpt_hpc.report.paper import (
    PRETRAINING_EPOCHS,
    PROTOCOL,
    TABLES,
    look_up,
    paper_set,
    pretraining_row,
    same_size,
    same_unit,
)
from dpt_hpc.report.summary import network_name
from dpt_hpc.report.table_files import write_tables
from dpt_hpc.report.tables import Column, Result, Row, Table
from dpt_hpc.report.wording import NO_BREAK, count, weights_ratio
from dpt_hpc.suite.config import BASELINE
from dpt_hpc.suite.facts import facts_of, plain, unit_of, unused_record
from dpt_hpc.suite.leaks import leaks_in
from dpt_hpc.suite.plan import FinetuneCell, Plan, Start
from dpt_hpc.suite.weights import keep_weights
from dpt_hpc.train.compat import departures, recipe_of_our_own
from dpt_hpc.train.monitor import write_json

HEADER = """# Fine-tuning after pre-training

Written from run directories and records by

    {command}

Every number is that of a run whose settings, seeds, data and recorded command are in `{cells}/`; the commands below
make the same runs anew. The paper (Jia et al., Digital Discovery 2024, 3, 586) pre-trained on 187,687 structures
(denoising on 62,783), these rows on as many as their column says: compare improvements with its, not errors. Its
baselines compare directly, but for what a table says it differs in."""


def write_outcome(plan: Plan, out: Path, command: str) -> list[Path]:
    """Write tables.md, tables.csv, tables.json and figures of what is there or recorded of `plan`; returns the paths.

    The facts of every cell go into cells/ beside them; where `out` is the directory of the suite's records or below it,
    into the records, and so do the weights of the pre-trainings that were run here.
    """
    from dpt_hpc.report.curves import draw_curves  # matplotlib: half a second that a status need not pay

    kept = plan.records if plan.records is not None and _within(out, plan.records) else None
    cells = (kept or out) / "cells"
    tables = tables_of(plan)
    header = HEADER.format(command=plain(command), cells=os.path.relpath(cells, out))
    written = write_tables(tables, out, header=header)
    for name, figure in plan.figures.items():
        table = next((t for t in tables if (t.network, t.pooling) == (figure.network, figure.pooling)), None)
        drawn = table and draw_curves(table, figure.lines, figure.x, out / f"{name}.png")
        written += [drawn] if drawn else []
    contents = {cell: facts_of(cell) for cell in plan.order}  # before any is written: one says which fits another
    written += keep_weights(plan) if kept is not None else []
    for cell, content in contents.items():
        if content:
            file = cells / f"{cell.path.relative_to(plan.run_dir)}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, content)
            written.append(file)
    return written


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def tables_of(plan: Plan) -> list[Table]:
    """One table for each network and pooling, in the order of the plan."""
    found: dict[tuple[str, str], list[FinetuneCell]] = {}
    for cell in plan.cells:
        found.setdefault((cell.network, cell.pooling), []).append(cell)
    tables = []
    for (network, pooling), cells in found.items():
        other = plan.against.get(network)
        theirs = found.get((other.network, other.pooling), []) if other is not None else []
        baseline = [cell for cell in theirs if cell.start.name == BASELINE]
        tables.append(_table(network, pooling, cells, baseline, plan.leaks))
    return tables


def _table(
    network: str, pooling: str, cells: list[FinetuneCell], against: list[FinetuneCell], leaks: Sequence[Path]
) -> Table:
    columns: dict[str, Column] = {}
    rows: dict[str, list[FinetuneCell]] = {}
    for cell in cells:
        column = _column(cell)
        if cell.dataset not in columns or columns[cell.dataset].structures is None:
            columns[cell.dataset] = column
        rows.setdefault(cell.start.name, []).append(cell)
    for cell in against:
        if cell.dataset in columns and columns[cell.dataset].structures is None:
            columns[cell.dataset] = _column(cell)
    model = cells[0].config.model.name
    paper = TABLES.get((model, pooling))
    number = int(paper[0]) if paper else None
    form = f", the form of the paper's Table {number}" if number else ""
    kind = network_name(model) if network == model else f"{network} ({network_name(model)})"
    title = f"{kind}, {pooling} pooling{form}"
    ordered = sorted(rows.values(), key=lambda own: own[0].start.name != BASELINE)
    references: dict[str, Any] = {}
    made = []
    if against:
        name = f"{against[0].network}, {against[0].pooling} pooling"
        made.append(replace(_row(against, columns, references), label=f"baseline: {name}, not pre-trained"))
    for own in ordered:
        row = _row(own, columns, references)
        scratch = against and row.name == BASELINE
        made.append(replace(row, name="scratch", label="not pre-trained") if scratch else row)
    notes = _departures(cells) + leaks_in(leaks, cells)
    return Table(network, pooling, title, tuple(columns.values()), tuple(made), number, tuple(notes))


def _departures(cells: list[FinetuneCell]) -> list[str]:
    """A line on what the runs of one network do otherwise than the paper's."""
    starts = {cell.start.cell for cell in cells if cell.start.cell is not None}
    found = {
        "pre-training": dict.fromkeys(d for start in starts for d in departures(start.config)),
        "fine-tuning": dict.fromkeys(d for cell in cells for d in departures(cell.config)),
    }
    words = [f"{task}: {', '.join(sorted(names))}" for task, names in found.items() if names]
    return [f"Differs from the paper in {'; '.join(words)}."] if words else []


def _column(cell: FinetuneCell) -> Column:
    known = paper_set(cell.dataset)
    title = known.column if known is not None else cell.dataset
    facts = facts_of(cell)  # of what has ended alone: tables are the same wherever the records are
    structures = [source["structures"] for source in facts.get("dataset", [])]
    unit = facts.get("unit") or unit_of(cell) or (known.unit if known is not None else "")
    return Column(cell.dataset, title, unit, sum(structures) or None)


def _row(cells: list[FinetuneCell], columns: Mapping[str, Column], references: dict[str, Any]) -> Row:
    """references: by dataset, data and split of the first row that has them, with which all others are compared."""
    start = cells[0].start
    pretraining = facts_of(start.cell) if start.cell is not None else {}
    results = {}
    for cell in cells:
        facts, unused = facts_of(cell), unused_record(cell)
        if unused and not facts:
            results[cell.dataset] = Result({}, len(cell.config.seeds), notes=(unused,))
        if facts:
            facts["notes"] = [*facts["notes"], *([unused] if unused else [])]
            sources = [source["digest"] for source in facts["dataset"]], facts["config"].get("data", {}).get("split")
            if not facts["faults"] and sources != references.setdefault(cell.dataset, sources):
                facts["faults"].append("its data or their split are not those of the rows above")
            results[cell.dataset] = _result(cell, facts, pretraining)
    unused = unused_record(start.cell) if start.cell is not None else None
    if start.cell is None or not pretraining:
        return Row(start.name, label_of(start), results, notes=(unused,) if unused else ())
    notes = [f"pre-trained with other options than configured: {o}" for o in pretraining["other_options"]]
    names = [source["name"] for source in pretraining["dataset"]]
    if names != [Path(path).name for path in start.cell.config.data.path]:
        notes.append(f"pre-trained on other data than configured: {' + '.join(start.cell.config.data.path)}")
    return Row(
        start.name,
        label_of(start),
        results,
        structures=pretraining["split"]["train"],
        epochs=start.epochs or pretraining["epochs"],
        dataset=" + ".join(names),
        command=pretraining["command"],
        notes=tuple(notes),
    )


def label_of(start: Start) -> str:
    """A row's name, as the paper has it."""
    if start.label is not None:
        return start.label
    if start.cell is None:
        return "baseline (not pre-trained)"
    objective = start.cell.config.objective.model_dump(mode="json")
    kind = objective["kind"]
    ratio = weights_ratio(objective).replace(NO_BREAK, " ")
    name = f"forces {ratio}" if kind == "derivatives" else str(kind).replace("_", " ")
    if start.epochs is not None:
        return f"{name}, first {_plain_count(start.epochs)}"
    epochs = start.cell.config.training.epochs
    return name if epochs == PRETRAINING_EPOCHS else f"{name}, {_plain_count(epochs)}"


def _result(cell: FinetuneCell, facts: Mapping[str, Any], pretraining: Mapping[str, Any]) -> Result:
    notes = [f"run with other options than configured: {option}" for option in facts["other_options"]]
    notes += [f"no result: {fault}" for fault in facts["faults"]] + facts["notes"]
    errors = {} if facts["faults"] else {int(seed): float(error) for seed, error in facts["test_mae"].items()}
    paper = _paper(cell, facts, pretraining)
    if paper is not None and (other := _other_protocol(facts)):
        paper = None
        notes.append(f"the paper's number does not stand beside it: {', '.join(other)}")
    if cell.config.data.split.matbench is not None:
        notes.append("Matbench's official folds; the mean is over the folds' errors, as Matbench has it")
    return Result(errors, len(cell.config.seeds), paper and paper[0], paper and paper[1], tuple(notes))


def _paper(cell: FinetuneCell, facts: Mapping[str, Any], pretraining: Mapping[str, Any]) -> tuple[float, int] | None:
    """The paper's error for this cell and its table, where the structures are the paper's."""
    reference = look_up(cell.dataset, cell.config.model.name, cell.pooling)
    structures = sum(source["structures"] for source in facts["dataset"])
    if reference is None or not same_size(structures, reference.dataset):
        return None
    if not same_unit(facts["unit"], reference.dataset):
        return None
    if cell.start.cell is None:
        return reference.of(BASELINE)
    row = pretraining_row(pretraining.get("objective") or {"kind": "unknown"})
    return reference.of(row, cell.start.epochs or pretraining["epochs"]) if row is not None else None


def _other_protocol(facts: Mapping[str, Any]) -> list[str]:
    """In what a fine-tuning is not the paper's: parts of the data, and how long it was."""
    data = facts["config"].get("data", {})
    split = data.get("split", {})
    fractions = tuple(split.get(part) for part in ("train", "validation", "test"))
    found = []
    if split.get("matbench"):
        found.append("Matbench's folds")
    elif split.get("by") != "structure" or fractions != PROTOCOL.split:
        found.append(f"a split of {'/'.join(map(str, fractions))} by {split.get('by')}")
    if split.get("train_fraction", 1) != 1:
        found.append(f"{split['train_fraction']:g} of the training part")
    if data.get("exclude"):
        found.append("structures are excluded")
    if facts["epochs"] != PROTOCOL.epochs:
        found.append(_plain_count(facts["epochs"]))
    if own := recipe_of_our_own(facts["config"]):
        found.append(f"a recipe of our own ({', '.join(own)})")
    return found


def _plain_count(epochs: int) -> str:
    return count(epochs, "epoch").replace(NO_BREAK, " ")

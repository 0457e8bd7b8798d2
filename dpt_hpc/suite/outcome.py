"""What a suite's run directories hold, as tables and as one JSON file per cell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpt_hpc.errors import DataError
from dpt_hpc.report.paper import TABLES, look_up, paper_set, pretraining_row, same_size, same_unit
from dpt_hpc.report.summary import network_name
from dpt_hpc.report.table_files import write_tables
from dpt_hpc.report.tables import Column, Result, Row, Table
from dpt_hpc.report.wording import NO_BREAK, weights_ratio
from dpt_hpc.suite.config import BASELINE
from dpt_hpc.suite.plan import FinetuneCell, Plan, PretrainCell, Start
from dpt_hpc.suite.work import units_of
from dpt_hpc.train.checkpoint import find_checkpoint
from dpt_hpc.train.finetune import describe_checkpoint
from dpt_hpc.train.monitor import write_json
from dpt_hpc.train.run import finished_to
from dpt_hpc.train.run_dir import changed_options

HEADER = """# Fine-tuning after pre-training

Written by `{command}` from the run directories; every number is that of a run whose settings, seeds, data and command
are in `cells/`. The paper (Jia et al., Digital Discovery 2024, 3, 586) pre-trained on 187,687 structures (denoising on
62,783), these rows on as many as their column says: compare improvements with its, not errors. Its baselines compare
directly."""

PRETRAINING_EPOCHS = 100
"""Of the paper's Tables 2 to 4: a row of another length says so."""

SUMMED_UP = ("command", "git", "device", "split", "parameters")
"""Facts of run.json that a cell's file keeps."""


def write_outcome(plan: Plan, out: Path, command: str) -> list[Path]:
    """Write tables.md, tables.csv, tables.json, cells/ and figures of what is there of `plan`; returns the paths."""
    from dpt_hpc.report.curves import draw_curves  # matplotlib: half a second that a status need not pay

    tables = tables_of(plan)
    written = write_tables(tables, out, header=HEADER.format(command=_plain(command)))
    for name, figure in plan.figures.items():
        table = next((t for t in tables if (t.network, t.pooling) == (figure.network, figure.pooling)), None)
        drawn = table and draw_curves(table, figure.lines, figure.x, out / f"{name}.png")
        written += [drawn] if drawn else []
    for cell in plan.order:
        if content := facts_of(cell):
            file = out / "cells" / f"{cell.path.relative_to(plan.run_dir)}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, content)
            written.append(file)
    return written


def tables_of(plan: Plan) -> list[Table]:
    """One table for each network and pooling, in the order of the plan."""
    found: dict[tuple[str, str], list[FinetuneCell]] = {}
    for cell in plan.cells:
        found.setdefault((cell.network, cell.pooling), []).append(cell)
    tables = []
    for (network, pooling), cells in found.items():
        other = plan.against.get(network)
        theirs = found.get((other.network, other.pooling), []) if other is not None else []
        tables.append(_table(network, pooling, cells, [cell for cell in theirs if cell.start.name == BASELINE]))
    return tables


def _table(network: str, pooling: str, cells: list[FinetuneCell], against: list[FinetuneCell]) -> Table:
    columns: dict[str, Column] = {}
    rows: dict[str, list[FinetuneCell]] = {}
    for cell in cells:
        column = _column(cell)
        if cell.dataset not in columns or columns[cell.dataset].structures is None:
            columns[cell.dataset] = column
        rows.setdefault(cell.start.name, []).append(cell)
    model = cells[0].config.model.name
    paper = TABLES.get((model, pooling))
    number = int(paper[0]) if paper else None
    form = f", the form of the paper's Table {number}" if number else ""
    kind = network_name(model) if network == model else f"{network} ({network_name(model)})"
    title = f"{kind}, {pooling} pooling{form}"
    ordered = sorted(rows.values(), key=lambda own: own[0].start.name != BASELINE)
    made = [_row(own, columns) for own in ordered]
    if against:
        name = f"{against[0].network}, {against[0].pooling} pooling"
        made = [replace(row, name="scratch", label="not pre-trained") if row.name == BASELINE else row for row in made]
        made.insert(0, replace(_row(against, columns), label=f"baseline: {name}, not pre-trained"))
    return Table(network, pooling, title, tuple(columns.values()), tuple(made), number)


def _column(cell: FinetuneCell) -> Column:
    known = paper_set(cell.dataset)
    title = known.column if known is not None else cell.dataset
    structures = [source["structures"] for source in _first_facts(cell).get("dataset", [])]
    return Column(cell.dataset, title, _unit(cell), sum(structures) or None)


def _unit(cell: FinetuneCell) -> str:
    """Of the property, from the cell's summary or its dataset; "" if neither is at hand."""
    if unit := _json(cell.path / "results.json").get("unit"):
        return str(unit)
    for path in cell.config.data.path:
        units = _json(Path(path) / "dataset.json").get("property_units", {})
        if cell.config.objective.target in units:
            return str(units[cell.config.objective.target])
    return ""


def _row(cells: list[FinetuneCell], columns: Mapping[str, Column]) -> Row:
    start = cells[0].start
    known = [cell for cell in cells if cell.dataset in columns]
    results = {cell.dataset: result for cell in known if (result := _result(cell, columns[cell.dataset])) is not None}
    if start.cell is None:
        return Row(start.name, label_of(start), results)
    pretraining = facts_of(start.cell)
    return Row(
        start.name,
        label_of(start),
        results,
        structures=pretraining.get("split", {}).get("train"),
        epochs=start.epochs or start.cell.config.training.epochs,
        dataset=" + ".join(start.cell.config.data.path),
        command=pretraining.get("command"),
        notes=tuple(
            f"pre-trained with other options than configured: {o}" for o in pretraining.get("other_options", ())
        ),
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
        return f"{name}, first {start.epochs} epochs"
    epochs = start.cell.config.training.epochs
    return name if epochs == PRETRAINING_EPOCHS else f"{name}, {epochs} epochs"


def _result(cell: FinetuneCell, column: Column) -> Result | None:
    facts = facts_of(cell)
    if not facts:
        return None
    errors = {int(seed): float(error) for seed, error in facts["test_mae"].items()}
    paper = _paper(cell, column)
    notes = tuple(f"run with other options than configured: {option}" for option in facts["other_options"])
    if _other_weights(cell, facts["pretrained_sha256"]):
        notes += ("fine-tuned from other weights than the pre-training's best ones are now",)
    if cell.config.data.split.matbench is not None:
        notes += ("Matbench's official folds; the mean is over the folds' errors, as Matbench has it",)
    return Result(errors, len(cell.config.seeds), paper and paper[0], paper and paper[1], notes)


def _other_weights(cell: FinetuneCell, digest: str | None) -> bool:
    """Whether a whole pre-training has gone on since its weights, of SHA-256 `digest`, were taken."""
    start = cell.start
    if start.cell is None or start.epochs is not None or digest is None:
        return False
    try:
        now: str = describe_checkpoint(find_checkpoint(start.cell.path))["digest"]
    except DataError:  # its checkpoints were deleted
        return False
    return now != digest


def _paper(cell: FinetuneCell, column: Column) -> tuple[float, int] | None:
    """The paper's error for this cell and its table, where the structures are the paper's and the split is random."""
    reference = look_up(cell.dataset, cell.config.model.name, cell.pooling)
    if reference is None or column.structures is None or cell.config.data.split.matbench is not None:
        return None
    if not same_size(column.structures, reference.dataset) or not same_unit(column.unit, reference.dataset):
        return None
    if cell.start.cell is None:
        return reference.of(BASELINE)
    row = pretraining_row(cell.start.cell.config.objective.model_dump(mode="json"))
    epochs = cell.start.epochs or cell.start.cell.config.training.epochs
    if row is None or epochs not in (PRETRAINING_EPOCHS, *reference.by_epochs):
        return None
    return reference.of(row, epochs)


def facts_of(cell: PretrainCell | FinetuneCell) -> dict[str, Any]:
    """All that is to be kept of a cell's finished runs; {} if there are none."""
    done = [unit for unit in units_of(cell) if finished_to(unit.path, cell.config.training.epochs)]
    if not done:
        return {}
    runs = [(_json(unit.path / "run.json"), _json(unit.path / "results.json")) for unit in done]
    first, results = runs[0]
    common: dict[str, Any] = {
        "network": cell.network,
        **{name: first.get(name) for name in SUMMED_UP},
        "command": _plain(str(first.get("command", ""))),
        "versions": {name: first.get("versions", {}).get(name) for name in ("dpt-hpc", "torch")},
        "dataset": [
            {"name": Path(s["path"]).name, "structures": s["structures"], "digest": s["digest"]}
            for s in first["dataset"]
        ],
        "epochs": cell.config.training.epochs,
        "wall_seconds": [run.get("wall_seconds") for run, _ in runs],
        "other_options": [o for o in changed_options(cell.config, done[0].path / "config.yaml") if not _moved(o)],
    }
    if isinstance(cell, PretrainCell):
        kept = {name: results.get(name) for name in ("objective", "best_epoch", "validation", "test")}
        return {"pretraining": cell.name, **common, **kept}
    pretrained = first.get("pretrained") or {}
    return {
        "pooling": cell.pooling,
        "pretraining": cell.start.name,
        **common,
        "pretrained_sha256": pretrained.get("digest"),
        "property": cell.config.objective.target,
        "unit": _unit(cell),
        "test_mae": {str(u.seed): r["test"]["target_mae"] for u, (_, r) in zip(done, runs, strict=True)},
        "best_epoch": {str(u.seed): r["best_epoch"] for u, (_, r) in zip(done, runs, strict=True)},
    }


def _first_facts(cell: FinetuneCell) -> dict[str, Any]:
    return next((facts for unit in units_of(cell) if (facts := _json(unit.path / "run.json"))), {})


def _moved(option: str) -> bool:
    """Whether only a directory has another name: what was read there is told by its digest."""
    return option.startswith("pretrained:")


def _plain(command: str) -> str:
    """A recorded command as one types it, without the directories of the machine that it ran on."""
    if not command:
        return ""
    program, *words = shlex.split(command)
    return shlex.join(["dpt-hpc" if program == "__main__.py" else program, *map(_without_folders, words)])


def _without_folders(word: str) -> str:
    if word.endswith(".yaml") and "configs/" in word:
        return f"configs/{word.rpartition('configs/')[2]}"
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).name}" if equals and value.startswith("/") else word


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

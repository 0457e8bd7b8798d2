"""Tables as files: tables.md to read, tables.csv to compute with, tables.json with everything."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpt_hpc.report.tables import METHOD, Column, Improvement, Result, Row, Table, improvement_on, improvement_over
from dpt_hpc.report.wording import mean_and_std

MISSING = "—"

LEGEND = (
    "Test MAE, mean ± standard deviation over the seeds; in square brackets the paper's, where its dataset has the "
    "same structures, and the fine-tuning the same split and length. — is not run yet, or no result for a reason told "
    "below the table. The average improvement is that of the paper's last column: the mean "
    "over the row's datasets of 100 (baseline − MAE) / baseline; the paper's beside it is over the same "
    "datasets, of its numbers. The last row is the paper's, too: the best of the rows above on each dataset, and in "
    "brackets the paper's best of them."
)

FIELDS = (
    "network", "pooling", "pretraining", "dataset", "unit", "seeds", "planned_seeds", "mae", "std", "improvement",
    "improvement_low", "improvement_high", "paper_mae", "paper_improvement", "pretraining_structures",
    "pretraining_epochs", "pretraining_command",
)  # fmt: skip


def write_tables(tables: Sequence[Table], out: Path, *, header: str) -> list[Path]:
    """Write tables.md, tables.csv and tables.json into `out`; returns their paths. header: Markdown before them."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "tables.md": _markdown(tables, header),
        "tables.csv": _csv(tables),
        "tables.json": json.dumps([_table(table) for table in tables], indent=1, ensure_ascii=False) + "\n",
    }
    for name, content in contents.items():  # by every worker of a suite, when it finds nothing left to do
        temporary = out / f".{name}.{platform.node()}.{os.getpid()}"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, out / name)
    return [out / name for name in contents]


def _markdown(tables: Sequence[Table], header: str) -> str:
    parts = [header, LEGEND, METHOD]
    for table in tables:
        parts += [f"## {table.title}", *table.notes, _grid(table), _origins(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _grid(table: Table) -> str:
    head = ["pre-training", "structures", *map(_heading, table.columns), "average improvement (95 %)"]
    lines = [head, ["---", "---:", *["---:"] * len(table.columns), "---:"]]
    for row in table.rows:
        cells = [_cell(row.results.get(column.dataset)) for column in table.columns]
        average = MISSING if row is table.baseline else _average(improvement_over(table, row), len(table.columns))
        lines.append([row.label, f"{row.structures:,}" if row.structures else MISSING, *cells, average])
    best = [_best(table, column.dataset) for column in table.columns]
    if any(best):
        lines.append(["best improvement", "", *(text or MISSING for text in best), ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _best(table: Table, dataset: str) -> str:
    """The largest improvement on a dataset, as the last row of the paper's tables, and the paper's own over its rows
    that are here; "" while nothing compares."""
    rows = [row for row in table.rows if row.name != "scratch"]  # of a recipe that is compared with another's baseline
    found = [(better, row) for row in rows if (better := improvement_on(table, row, dataset)) is not None]
    if not found:
        return ""
    best, row = max(found, key=lambda pair: pair[0].value)
    papers = [better.paper for better, _ in found if better.paper is not None]
    shared, planned = best.seeds
    some = f", {shared} of {planned} seeds" if shared < planned else ""
    return f"{best.value:+.1f} % ({row.label}{some})" + (f" [{max(papers):+.1f} %]" if papers else "")


def _heading(column: Column) -> str:
    return f"{column.title} ({column.unit})" if column.unit else column.title


def _cell(result: Result | None) -> str:
    if result is None or result.mean is None:
        return MISSING
    text, deviation = mean_and_std(result.mean, result.std)
    words = [f"{text} ± {deviation}" if result.std is not None else text]
    if not result.complete:
        words.append(f"({len(result.errors)} of {result.expected} seeds)")
    if result.paper is not None:
        words.append(f"[{result.paper:g}]")
    return " ".join(words)


def _average(improvement: Improvement | None, columns: int) -> str:
    if improvement is None:
        return MISSING
    words = [f"{improvement.value:+.1f} %"]
    if improvement.interval is not None:
        words.append("({:+.1f} … {:+.1f})".format(*improvement.interval))
    if len(improvement.datasets) < columns:
        words.append(f"over {len(improvement.datasets)} of {columns} datasets")
    if improvement.seeds[0] < improvement.seeds[1]:
        fewest = "" if len(improvement.datasets) == 1 else "at least "
        words.append(f"({fewest}{improvement.seeds[0]} of {improvement.seeds[1]} seeds)")
    if improvement.paper is not None:
        words.append(f"[{improvement.paper:+.1f} %]")
    return " ".join(words)


def _origins(table: Table) -> str:
    """What each row was pre-trained on and by which command, and the notes of its cells."""
    lines = []
    for row in table.rows:
        if row.structures is not None:
            where = f" of {row.dataset}" if row.dataset else ""
            epochs = f", {row.epochs} {'epoch' if row.epochs == 1 else 'epochs'}" if row.epochs else ""
            by = f": `{row.command}`" if row.command else ""
            lines.append(f"- {row.label}: pre-trained on {row.structures:,} structures{where}{epochs}{by}")
        lines += [f"- {row.label}: {note}" for note in row.notes]
        lines += [f"- {row.label}, {name}: {note}" for name, result in row.results.items() for note in result.notes]
    return "\n".join(lines)


def _csv(tables: Sequence[Table]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for table in tables:
        for row in table.rows:
            for column in table.columns:
                if (result := row.results.get(column.dataset)) is not None:
                    writer.writerow(_line(table, row, column, result))
    return out.getvalue()


def _line(table: Table, row: Row, column: Column, result: Result) -> list[object]:
    better = improvement_on(table, row, column.dataset)
    low, high = (better.interval if better is not None else None) or (None, None)
    numbers = [result.mean, result.std, better and better.value, low, high, result.paper, better and better.paper]
    texts = ["" if n is None else f"{n:.6g}" for n in numbers]
    origin = [row.structures or "", row.epochs or "", row.command or ""]
    seeds = [" ".join(map(str, sorted(result.errors))), result.expected]
    return [table.network, table.pooling, row.name, column.dataset, column.unit, *seeds, *texts, *origin]


def _table(table: Table) -> dict[str, Any]:
    return {
        "network": table.network,
        "pooling": table.pooling,
        "title": table.title,
        "paper_table": table.paper_table,
        "notes": list(table.notes),
        "columns": [vars(column) for column in table.columns],
        "rows": [_row(table, row) for row in table.rows],
    }


def _row(table: Table, row: Row) -> dict[str, Any]:
    return {
        "pretraining": row.name,
        "label": row.label,
        "pretrained_on": {"structures": row.structures, "dataset": row.dataset, "epochs": row.epochs},
        "command": row.command,
        "notes": list(row.notes),
        "average_improvement": _improvement(improvement_over(table, row)),
        "results": {
            name: {
                "test_mae": {str(seed): _number(e) for seed, e in sorted(result.errors.items())},
                "planned_seeds": result.expected,
                "mean": _number(result.mean),
                "std": _number(result.std),
                "paper": result.paper,
                "paper_table": result.paper_table,
                "improvement": _improvement(improvement_on(table, row, name)),
                "notes": list(result.notes),
            }
            for name, result in row.results.items()
        },
    }


def _improvement(improvement: Improvement | None) -> dict[str, Any] | None:
    if improvement is None:
        return None
    return {
        "percent": _number(improvement.value),
        "interval": improvement.interval,
        "datasets": improvement.datasets,
        "paper_percent": improvement.paper,
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

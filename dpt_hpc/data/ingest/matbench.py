"""Reader of Matbench's files: a pandas table (orient="split") whose structures are pymatgen's, as dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpt_hpc.data.ingest.json_readers import structure_arrays, targets_of
from dpt_hpc.data.ingest.json_stream import JsonError, stream_table
from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.record import Broken, Record, RecordError

STRUCTURE = "structure"
HEAD = {"index", "columns"}


def read_matbench(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """{index: [..], columns: [structure, ..], data: [[structure as dict, value, ..], ..]}, one row in memory at a time.

    Targets: the columns called so, or all columns but the structure in the order in which the targets are named. Rows
    of a file matbench_NAME.json.gz get the ids of Matbench v0.1 (mb-NAME-0001: its place, counted from 1), which its
    folds name; those of another file their index.
    """
    head: dict[str, Any] = {}
    number = 0
    try:
        for key, value in stream_table(path, "data"):
            if key != "data":
                head[key] = value
                continue
            name = f"record {number}"
            if number == 0 and (fault := _fault(head)) is not None:
                yield Broken(name, fault, rest_lost=True)
                return
            try:
                yield _row(name, value, head["columns"], _ids(path, head["index"], number), options)
            except RecordError as error:
                yield Broken(name, str(error))
            except (AttributeError, ArithmeticError, TypeError, ValueError, LookupError) as error:
                yield Broken(name, f"is not of this format: {type(error).__name__}: {error}")
            number += 1
    except JsonError as error:
        yield Broken(f"record {number}", f"{error}; the rest of the file is not read", rest_lost=True)


def _fault(head: Mapping[str, Any]) -> str | None:
    """What is wrong with what comes before the rows."""
    if missing := sorted(HEAD - set(head)):
        return f"{' and '.join(missing)} must come before data (found {', '.join(head) or 'nothing'})"
    for key in sorted(HEAD):
        if not isinstance(head[key], list):
            return f"{key} is {head[key]!r:.60}, expected a list"
    if not all(isinstance(name, str) for name in head["columns"]):
        return f"columns are {head['columns']!r:.60}, expected names"
    if len(set(head["columns"])) < len(head["columns"]):
        return f"two columns have the same name: {', '.join(head['columns'])}"
    if STRUCTURE not in head["columns"]:
        return f"no column is called {STRUCTURE}: {head['columns']}"
    return None


def _row(name: str, row: Any, columns: list[str], structure_id: str, options: IngestOptions) -> Record:
    if not isinstance(row, list) or len(row) != len(columns):
        raise RecordError(f"is not a row of {len(columns)} values: {', '.join(columns)}")
    values = dict(zip(columns, row, strict=True))
    structure = values.pop(STRUCTURE)
    beside = {**values, "y": list(values.values())}
    return Record(
        name,
        *structure_arrays(structure),
        properties=targets_of(beside, options.targets),
        structure_id=structure_id if options.id_key is None else str(values[options.id_key]),
        group="" if options.group_key is None else str(values[options.group_key]),
        ignored=() if options.targets else tuple(values),
        fields=tuple(values),
    )


def _ids(path: Path, index: list[Any], number: int) -> str:
    stem = path.name.partition(".")[0]
    if not stem.startswith("matbench_"):
        return str(index[number])
    place = int(index[number]) + 1 if isinstance(index[number], int) else number + 1
    return f"{stem.replace('matbench', 'mb').replace('_', '-')}-{place:0{len(str(len(index)))}d}"

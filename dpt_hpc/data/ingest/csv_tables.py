"""Reader of a CSV table whose rows name structure files (CIF, or any other that ingest reads) and state properties."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpt_hpc.data.ingest.json_stream import open_text
from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.record import Broken, Record, RecordError, scalar

FILE_COLUMNS = ("file", "path", "structure", "cif")
"""What the column of files may be called."""


def read_csv(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """A header, then a row for each structure: its file, relative to the table's folder, and its properties.

    Targets: the columns called so; an empty cell is a property that the structure lacks. Of the files only the geometry
    is taken, one structure of each.
    """
    number = 0
    try:
        with open_text(path) as stream:
            rows = csv.reader(stream, strict=True)
            header = [name.strip().removeprefix("\ufeff") for name in next(rows, [])]
            if (fault := _fault(header, options)) is not None:
                yield Broken("record 0", fault, rest_lost=True)
                return
            for row in rows:
                if not row:  # an empty line
                    continue
                name = f"record {number}"
                try:
                    yield _row(name, path.parent, header, row, options)
                except RecordError as error:
                    yield Broken(name, str(error))
                number += 1
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        yield Broken(f"record {number}", f"cannot be read: {error}; the rest of the file is not read", rest_lost=True)


def _fault(header: Sequence[str], options: IngestOptions) -> str | None:
    """What is wrong with the first line."""
    found = f"its columns are {', '.join(header)[:200] or 'none'}"
    if len(set(header)) < len(header):
        return f"two columns have one name: {found}"
    if len([name for name in header if name in FILE_COLUMNS]) != 1:
        return f"expected one column of files, called {' or '.join(FILE_COLUMNS)}, and commas between columns: {found}"
    if missing := [name for name in options.targets if name not in header]:
        return f"no column is called {missing[0]}: {found}"
    return None


def _row(name: str, folder: Path, header: Sequence[str], row: Sequence[str], options: IngestOptions) -> Record:
    if len(row) != len(header):
        raise RecordError(f"has {len(row)} cells, expected {len(header)}: {', '.join(header)}")
    cells = {column: cell.strip() for column, cell in zip(header, row, strict=True)}
    file = cells.pop(next(column for column in header if column in FILE_COLUMNS))
    geometry = _structure(folder / file, file)
    return Record(
        name,
        geometry.numbers,
        geometry.positions,
        geometry.cell,
        geometry.pbc,
        properties={target: scalar(cells[target], target) for target in options.targets if cells[target]},
        structure_id=cells.get(options.id_key, "") if options.id_key else Path(file).stem,
        group=cells.get(options.group_key, "") if options.group_key else "",
        ignored=() if options.targets else tuple(cells),
        fields=tuple(cells),
    )


def _structure(path: Path, file: str) -> Record:
    """The one structure of a file."""
    from dpt_hpc.data.ingest.formats import FORMATS, format_of_name  # late: this reader is one of them

    if not file or not path.is_file():
        raise RecordError(f"its file {file!r} is not there, seen from the table's folder")
    found = format_of_name(path)
    if found is None or found == "json":
        raise RecordError(f"its file {file!r} has a name that tells no format of structures, such as .cif or .xyz")
    records = FORMATS[found].reader(path, IngestOptions())
    first, second = next(records, None), next(records, None)
    if isinstance(first, Broken):
        raise RecordError(f"its file {file!r}: {first.reason}")
    if first is None or second is not None:
        raise RecordError(f"its file {file!r} holds {'no' if first is None else 'more than one'} structure")
    return first

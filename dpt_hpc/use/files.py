"""Structures out of files of any kind that ingest reads, and out of datasets, one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dpt_hpc.data.manifest import MANIFEST_NAME
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import DataError
from dpt_hpc.structure import Structure
from dpt_hpc.use.structures import check

PIECE = 1024
"""Structures of a dataset that are read at a time."""


def read_structures(
    paths: Sequence[str | Path],
    file_format: str | None = None,
    on_broken: Callable[[str], None] | None = None,
) -> Iterator[Structure]:
    """The structures of files, directories of files and datasets, in order; ids say file and record, and of files with
    one name their folder, too.

    file_format: read every file as this one of `dpt-hpc ingest`; None to tell by name and content. on_broken: told of
    each record that cannot be read, and the next one follows; None to raise. Labels are not read.

    Raises DataError for a path that is not there, a file without structures, and a broken record.
    """
    sources = [(path, _files(path)) for path in map(Path, paths)]
    names = Counter(file.name for _, files in sources for file in files or ())
    for path, files in sources:
        if files is None:
            dataset = Dataset.open(path)
            for index in range(len(dataset)):
                yield dataset.get(index)
        else:
            yield from _read_files(files, names, file_format, on_broken)


def _files(path: Path) -> list[Path] | None:
    """Those at `path`; None for a dataset."""
    if (path / MANIFEST_NAME).is_file():
        return None
    from dpt_hpc.data.ingest.sources import find_sources  # late: see below

    return find_sources([path]).paths


def _read_files(
    files: Sequence[Path],
    names: Counter[str],
    file_format: str | None,
    on_broken: Callable[[str], None] | None,
) -> Iterator[Structure]:
    # Late: ase and pymatgen take a second, and structures in memory need neither.
    from dpt_hpc.data.ingest.formats import FORMATS, detect_format
    from dpt_hpc.data.ingest.options import IngestOptions
    from dpt_hpc.data.ingest.record import Broken

    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: is empty.\nCheck the file, or leave it out.")
        found = 0
        for record in FORMATS[file_format or detect_format(file)].reader(file, IngestOptions()):
            found += 1
            name = f"{file}: {record.name}"
            try:
                if isinstance(record, Broken):
                    raise DataError(f"{name}: {record.reason}.\nMend it, or leave broken records out: --skip-broken.")
                own = record.structure_id or f"{file.name}:{record.name.removeprefix('record ')}"
                structure = Structure(
                    positions=torch.tensor(np.asarray(record.positions), dtype=torch.float64),
                    cell=torch.tensor(np.asarray(record.cell), dtype=torch.float64),
                    pbc=torch.tensor(np.asarray(record.pbc), dtype=torch.bool),
                    atomic_numbers=torch.tensor(np.asarray(record.numbers), dtype=torch.int64),
                    structure_id=str(file.parent / own) if names[file.name] > 1 and own.startswith(file.stem) else own,
                )
                check(structure, name)
            except DataError as error:
                if on_broken is None:
                    raise
                on_broken(str(error).partition("\n")[0])
                continue
            yield structure
        if not found:
            raise DataError(f"{file}: holds no structure.\nCheck the file, or name its format with --format.")

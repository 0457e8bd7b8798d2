"""A CSV table of structure files and properties, ingested; what is wrong with one, by record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.io import write

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import DataError
from dpt_hpc.use.files import read_structures

GAP = IngestOptions(targets={"gap": "eV"})
HEADER = "file,gap,who\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """cifs/Si.cif and cifs/Ge.cif, and a file of two frames."""
    (tmp_path / "cifs").mkdir()
    for symbol in ("Si", "Ge"):
        write(tmp_path / "cifs" / f"{symbol}.cif", bulk(symbol))
    write(tmp_path / "two.xyz", [bulk("Si"), bulk("Ge")])
    return tmp_path


def table(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_become_structures_with_their_properties(folder: Path) -> None:
    path = table(folder, "\ufeff" + HEADER + "cifs/Si.cif, 1.1,me\n\ncifs/Ge.cif,,you\n")
    ingest([path], folder / "out", IngestOptions(targets={"gap": "eV"}, group_key="who"))
    dataset = Dataset.open(folder / "out")
    assert dataset.structure_ids.tolist() == ["Si", "Ge"]
    assert dataset.groups.tolist() == ["me", "you"]
    np.testing.assert_array_equal(dataset.property_values("gap"), [1.1, np.nan])
    assert dataset.get(0).atomic_numbers.tolist() == [14, 14]
    assert [s.structure_id for s in read_structures([path])] == ["Si", "Ge"]  # as `predict` reads it


def test_beside_its_files_a_table_counts_only_where_it_is_named(folder: Path) -> None:
    table(folder / "cifs", HEADER + "Si.cif,1.1,me\n")
    ingest([folder / "cifs"], folder / "out")
    assert Dataset.open(folder / "out").property_names == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one column of files, called file or path or structure or cif"),
        ("file;gap\n", "commas between columns: its columns are file;gap"),
        ("file,gap,gap\n", "two columns have one name"),
        ("file,bandgap\ncifs/Si.cif,1\n", "no column is called gap"),
        (HEADER + "cifs/Sn.cif,1,me\n", "record 0: its file 'cifs/Sn.cif' is not there"),
        (HEADER + "table.csv,1,me\n", "tells no format of structures"),
        (HEADER + "two.xyz,1,me\n", "holds more than one structure"),
        (HEADER + "cifs/Si.cif,1\n", "has 2 cells, expected 3"),
        (HEADER + "cifs/Si.cif,about 1,me\n", "gap: not numbers"),
        (HEADER + "cifs/Si.cif,nan,me\n", "gap"),
        (HEADER + 'cifs/Si.cif,"1,me\n', "cannot be read: unexpected end of data"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match="record 0") as caught:
        ingest([table(folder, text)], folder / "out", GAP)
    assert message in str(caught.value)


def test_a_table_without_a_target_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no label was read, but its records have gap, who"):
        ingest([table(folder, HEADER + "cifs/Si.cif,1.1,me\n")], folder / "out")

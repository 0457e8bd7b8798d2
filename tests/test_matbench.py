"""Matbench's files: tables whose structures are pymatgen's, read row by row; what their folds name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from ase import Atoms
from crystals import as_pymatgen, crystals, dump
from monty.json import MontyEncoder

from dpt_hpc.data.catalog import Catalog
from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.ingest.json_stream import JsonError, stream_table
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import DataError

GAPS = [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def write_matbench(path: Path, items: list[Atoms], column: str = "gap pbe", name: str = "matbench_mp_gap") -> Path:
    """As matminer writes a table: pandas' split form, structures by monty's encoder, gzipped."""
    table = pandas.DataFrame({"structure": [as_pymatgen(atoms) for atoms in items], column: GAPS[: len(items)]})
    file = path / f"{name}.json.gz"
    file.write_bytes(gzip.compress(json.dumps(table.to_dict(orient="split"), cls=MontyEncoder).encode()))
    return file


def changed(path: Path, **changes: Any) -> Path:
    """The table of `path` with other entries, as plain JSON."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    return dump(path.with_name("changed.json"), {**content, **changes})


def test_a_table_is_read_with_the_ids_of_the_folds(tmp_path: Path) -> None:
    items = crystals()
    entry = Catalog.read()["matbench_mp_gap"]
    report = ingest([write_matbench(tmp_path, items)], tmp_path / "out", entry.options)
    assert report.sources[0].format == "matbench"
    found = Dataset.open(tmp_path / "out")
    assert found.structure_ids.tolist() == [f"mb-mp-gap-{i}" for i in range(1, 7)]
    assert found.property_units == {"band_gap": "eV"}
    assert found.property_values("band_gap").tolist() == GAPS
    for i, atoms in enumerate(items):
        structure = found.get(i)
        np.testing.assert_array_equal(structure.atomic_numbers, atoms.numbers)
        np.testing.assert_allclose(structure.positions, atoms.positions, atol=1e-10)
        np.testing.assert_allclose(structure.cell, np.asarray(atoms.cell), atol=1e-12)


def test_ids_are_as_wide_as_their_count_and_other_files_keep_their_index(tmp_path: Path) -> None:
    items = crystals() * 2
    table = pandas.DataFrame({"structure": [as_pymatgen(atoms) for atoms in items], "n": range(12)})
    content = json.dumps(table.to_dict(orient="split"), cls=MontyEncoder)
    for name, first, last in (("matbench_jdft2d", "mb-jdft2d-01", "mb-jdft2d-12"), ("own", "0", "11")):
        (tmp_path / f"{name}.json").write_text(content)
        options = IngestOptions(targets={"n": "1"}, keep_duplicates=True)
        ingest([tmp_path / f"{name}.json"], tmp_path / name, options)
        ids = Dataset.open(tmp_path / name).structure_ids.tolist()
        assert (ids[0], ids[-1]) == (first, last)


def test_the_format_is_detected_and_a_column_found_by_name(tmp_path: Path) -> None:
    file = write_matbench(tmp_path, crystals())
    report = ingest([file], tmp_path / "out", IngestOptions(targets={"gap pbe": "eV"}))
    assert (report.sources[0].format, report.sources[0].detected) == ("matbench", True)
    assert Dataset.open(tmp_path / "out").property_values("gap pbe").tolist() == GAPS


def test_a_table_of_another_form_is_told(tmp_path: Path) -> None:
    file = write_matbench(tmp_path, crystals())
    content = json.loads(gzip.decompress(file.read_bytes()))
    options = IngestOptions(format="matbench", targets={"gap": "eV"})

    def refused(path: Path, reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            ingest([path], tmp_path / "out", options)

    refused(changed(file, columns=["crystal", "gap pbe"]), "no column is called structure")
    refused(dump(tmp_path / "late.json", {"data": content["data"]}), "columns and index must come before data")
    refused(changed(file, data={"0": 1}), "data starts with '{', expected a list")
    short = [*content["data"][:2], content["data"][2][:1], *content["data"][3:]]
    refused(changed(file, data=short), "record 2: is not a row of 2 values: structure, gap pbe")
    torn = json.dumps(content)
    (tmp_path / "torn.json").write_text(torn[: len(torn) // 2])
    refused(tmp_path / "torn.json", "the file cannot be read to its end")
    disordered = json.loads(json.dumps(content["data"]))
    disordered[4][0]["sites"][0]["species"][0]["occu"] = 0.5
    refused(changed(file, data=disordered), "record 4: site 0 is disordered")


def test_rows_come_one_by_one(tmp_path: Path) -> None:
    """The second row is read before the text goes wrong: so the list was not read whole."""
    (tmp_path / "some.json").write_text('{"index": [0, 1], "data": [[1], [2], ?')
    rows = stream_table(tmp_path / "some.json", "data")
    assert [next(rows) for _ in range(3)] == [("index", [0, 1]), ("data", [1]), ("data", [2])]
    with pytest.raises(JsonError):
        next(rows)
    (tmp_path / "some.json").write_text('{"data": [], "index": []} more')
    with pytest.raises(JsonError, match="'m' follows the end"):
        list(stream_table(tmp_path / "some.json", "data"))

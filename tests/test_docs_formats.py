"""What the page of data formats says is enough to write a dataset without dpt_hpc; and it names every column."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import run, small_options

from dpt_hpc.data.inspect import inspect_dataset, render_summary
from dpt_hpc.data.manifest import MANIFEST_NAME
from dpt_hpc.data.shard_file import COLUMNS
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import DataError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset that the page's own program writes, in a process that has no dpt_hpc."""
    folder = tmp_path_factory.mktemp("written")
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert "dpt_hpc" not in program
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    return folder / "by_hand"


def test_the_page_names_every_column() -> None:
    assert [name for name in COLUMNS if f"`{name}`" not in PAGE] == []


def test_a_dataset_written_by_the_page_is_inspected_and_read(by_hand: Path) -> None:
    summary = inspect_dataset(by_hand)
    assert dict(summary.labels) == {"energy": 10, "forces": 10, "stress": 10, "volume": 12}
    assert render_summary(summary) is not None
    dataset = Dataset.open(by_hand)
    assert dataset.get(11).energy is None
    assert dataset.get(11).structure_id == "Cu-11"
    stress = dataset.get(0).stress
    assert stress is not None
    assert float(stress.trace()) < 0  # compressed
    volumes = [dataset.get(i).volume for i in range(12)]
    np.testing.assert_allclose(dataset.property_values("volume"), volumes)


def test_a_run_trains_on_a_dataset_written_by_the_page(by_hand: Path, tmp_path: Path) -> None:
    run(small_options(by_hand), tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()


def test_a_key_that_the_page_does_not_name_is_refused(by_hand: Path, tmp_path: Path) -> None:
    text = (by_hand / MANIFEST_NAME).read_text(encoding="utf-8")
    (tmp_path / MANIFEST_NAME).write_text(text.replace('"schema_version"', '"colour": "blue", "schema_version"'))
    with pytest.raises(DataError, match="colour"):
        Dataset.open(tmp_path)

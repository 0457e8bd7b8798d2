"""Arrays written piece by piece are what they would be as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dpt_hpc.train.growing import GrowingArrays
from dpt_hpc.train.scoring import EdgeLimit, cut


def test_an_npz_written_in_pieces_is_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    (tmp_path / ".found.npz.parts").mkdir()
    (tmp_path / ".found.npz.parts" / "ids").write_bytes(b"left by a run that was killed")
    arrays = GrowingArrays(path)
    arrays.add({"ids": np.array(["a", "bcd"]), "forces": np.arange(6.0).reshape(2, 3)})
    assert not path.exists()
    arrays.add({"ids": np.array(["ünï-7"]), "forces": np.empty((0, 3)), "late": np.array([7])})
    arrays.add({"forces": -np.ones((1, 3))})
    arrays.publish()
    assert [file.name for file in tmp_path.iterdir()] == ["found.npz"]
    with np.load(path) as found:
        assert found["ids"].tolist() == ["a", "bcd", "ünï-7"]
        np.testing.assert_array_equal(found["forces"], [[0, 1, 2], [3, 4, 5], [-1, -1, -1]])
        assert found["late"].tolist() == [7]
        assert found["late"].dtype == np.int64


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, [[4, 0, 1], [2, 3]]),
        (100, [[4, 0, 1], [2], [3]]),
        (30, [[4, 0], [1], [2], [3]]),
        (1, [[4], [0], [1], [2], [3]]),
    ],
)
def test_an_evaluation_keeps_to_the_edge_budget(budget: int | None, expected: list[list[int]]) -> None:
    limit = EdgeLimit(np.array([10, 20, 15, 90, 5]), budget)
    found = [part.tolist() for part in cut(np.array([4, 0, 1, 2, 3]), 3, limit)]
    assert found == expected

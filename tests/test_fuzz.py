"""Every reader, on files that are spoilt: refused by a message that names them, or read right. `make fuzz` goes on with
ten thousand, from fresh seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_readers import READERS
from fuzz_structures import Reader
from fuzzing import spoilt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("count", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_spoilt_file_is_refused_or_read_right(reader: Reader, count: int, tmp_path: Path) -> None:
    file = reader.make(tmp_path)
    good = file.read_bytes()
    assert reader.outcome(file, good) == "accepted"

    @settings(
        max_examples=count // 4 if reader.costly else count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(draws=st.data())
    def each(draws: st.DataObject) -> None:
        reader.outcome(file, draws.draw(spoilt(reader.kind, good)))

    each()

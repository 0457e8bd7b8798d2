"""JSON larger than memory: items come one by one, and are those of the json module."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from crystals import crystals, dump, write_mptrj
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt_hpc.data.ingest.json_stream import JsonError, stream_items

MEMORY = """
import resource, sys
from dpt_hpc.data.ingest.json_readers import read_mptrj
from dpt_hpc.data.ingest import IngestOptions
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in read_mptrj(Path(sys.argv[1]), IngestOptions()))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_mptrj_is_streamed(tmp_path: Path) -> None:
    frames = json.loads(write_mptrj(tmp_path, crystals()).read_text())["mp-1"]
    path, text = tmp_path / "large.json", json.dumps(frames)
    with path.open("w") as out:
        out.write("{" + ",".join(f'"mp-{i}": {text}' for i in range(1000)) + "}")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 4_000
    assert path.stat().st_size > 8e6
    assert kilobytes < 8_000, "memory grows with the file"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(
    st.lists(JSON_VALUES, max_size=8) | st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=8),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_streamed_json_is_json(content: Any, window: int) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch("dpt_hpc.data.ingest.json_stream.FIRST_READ", window):
        path = dump(Path(folder) / "a.json", content)
        found = list(stream_items(path))
        assert found == (list(content.items()) if isinstance(content, dict) else [(None, v) for v in content])
        text = path.read_text().rstrip()
        for cut in {len(text) // 3, len(text) - 1} - {0}:
            path.write_text(text[:cut])
            with pytest.raises(JsonError):
                list(stream_items(path))


def test_nan_in_json_reaches_the_checks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"energy": NaN}]')
    ((_, item),) = stream_items(path)
    assert np.isnan(item["energy"])

"""The documentation, built once for the tests of a file, with warnings as errors."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from required import required

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MISSING = any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo"))
needs_docs = pytest.mark.skipif(MISSING and not required("docs"), reason="no Sphinx, MyST or furo: make docs")


@pytest.fixture(name="site", scope="module")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out

"""The compiled extension under the address and undefined-behaviour sanitizers: `make sanitize` runs this file.

As a plugin of pytest (-p sanitized) it puts the extension that is built for this in the place of dpt_hpc._C.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from emulated import ROOT, watched

BUILT = ROOT / "build" / "sanitize"
TESTS = [
    "test_radius_graph.py",
    "test_messages.py",
    "test_radial_messages.py",
    "test_gather_aggregate.py",
    "test_nasty_inputs.py",
]


def load() -> None:
    (library,) = BUILT.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("dpt_hpc._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["dpt_hpc._C"] = module


WRONG = """
from array import array
from dpt_hpc import _C
sources, ptr, order = array("q", [0, 99]), array("q", [0, 0]), array("q", [0, 0])
_C.edges_by_source(*(sources.buffer_info()[0], 2, 1, ptr.buffer_info()[0], order.buffer_info()[0]))
"""
"""Atom 99 of 1: it must not pass, or nobody watches."""


def main() -> int:
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    # Processes that a test starts would load the extension that is installed, which is not watched.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sanitized", "-p", "no:cacheprovider", *tests]
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | watched("address") | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    wrong = [sys.executable, "-c", f"import sanitized\n{WRONG}"]
    asleep = subprocess.run(wrong, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    if "ERROR: AddressSanitizer" not in asleep.stderr:
        print(f"An address that is wrong was not told:\n{asleep.stderr}", file=sys.stderr)
        return 1
    return subprocess.run([*command, *sys.argv[1:]], env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
if __name__ == "sanitized":
    load()

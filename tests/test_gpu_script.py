"""benchmarks/gpu.sh: its stages run, here on the CPU and small; a failed one is told, and does not stop the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from dpt_hpc import _C

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(out: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    """The exit status and gpu.json, with the extension that is installed."""
    settings = {"DEVICE": "cpu", "OUT": str(out), "PYTHON": sys.executable, "EXTENSION": _C.__file__}
    done = subprocess.run(["bash", SCRIPT], env={**os.environ, **settings, **environment}, check=False)
    return done.returncode, json.loads((out / "gpu.json").read_text())


@pytest.mark.slow
def test_every_stage_runs_on_the_cpu(tmp_path: Path) -> None:
    status, result = run(tmp_path)
    assert {name: stage["exit_status"] for name, stage in result["stages"].items()} == dict.fromkeys(
        ("preflight", "build", "tests", "memcheck", "racecheck", "measurements"), 0
    )
    assert status == 0
    assert any(" passed" in line for line in result["stages"]["tests"]["log"])
    assert result["stages"]["tests"]["failed_tests"] == []
    measured = [*result["radius_graph"].values(), *result["training_step"].values()]
    assert len(measured) >= 10
    assert not [m for m in measured if "failed" in m]


@pytest.mark.slow
def test_a_failed_stage_is_told(tmp_path: Path) -> None:
    """An extension that is none: nothing can run, every stage says so, and the file is written."""
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"")
    status, result = run(tmp_path / "out", EXTENSION=str(broken))
    assert status == 1
    assert result["stages"].pop("preflight")["exit_status"] == 0
    assert all(stage["exit_status"] for stage in result["stages"].values())
    assert {"machine", "date", "commit", "torch", "torch_cuda", "driver", "nvcc"} <= result.keys()


@pytest.mark.slow
def test_what_is_missing_is_told_before_anything_runs(tmp_path: Path) -> None:
    """A pytest that cannot be imported, from a wheel."""
    with ZipFile(tmp_path / "pytest.whl", "w") as wheel:
        wheel.writestr("pytest.py", "raise ImportError")
    status, result = run(tmp_path / "out", WHEELS=str(tmp_path))
    assert status == 1
    assert list(result["stages"]) == ["preflight"]
    assert any("import pytest" in line and "WHEELS=" in line for line in result["stages"]["preflight"]["log"])
    assert result["torch"]

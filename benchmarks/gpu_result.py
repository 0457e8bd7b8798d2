"""One JSON file of the stages of gpu.sh and of what they measured; needs nothing, so that a failed build is told too.

    python benchmarks/gpu_result.py FOLDER

FOLDER/stages has a line for each stage: name, exit status, seconds. Written to FOLDER/gpu.json, with the machine
and its software, the tails of the logs, the names of failed tests, and measured.json where it is.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import commit, processor, said

FAILED_TEST = re.compile(r"^(?:\S*/)?(test_\w+\.py::.*?) (?:FAILED|ERROR)\b", re.MULTILINE)
"""A line of `pytest -v`: it is there at once, whereas the summary is not if pytest is killed."""


def software() -> dict[str, Any]:
    """What can be said where nothing could be measured."""
    torch = said([sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda)"], 60.0)
    version, cuda = torch.split() if torch else (None, None)
    nvcc = said(["nvcc", "--version"])
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": processor(),
        "python": platform.python_version(),
        "torch": version,
        "torch_cuda": cuda,
        "driver": said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]),
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    stages: dict[str, dict[str, Any]] = {}
    for line in (folder / "stages").read_text().splitlines():
        name, status, seconds = line.split("\t")
        log = (folder / f"{name}.log").read_text(errors="replace")
        stages[name] = {"exit_status": int(status), "seconds": int(seconds), "log": log.splitlines()[-12:]}
        if name == "tests":
            stages[name]["failed_tests"] = list(dict.fromkeys(FAILED_TEST.findall(log)))
    known = folder / "machine.json"  # asked once: importing torch takes seconds
    if not known.exists():
        known.write_text(json.dumps(software()))
    measured = folder / "measured.json"
    result = json.loads(known.read_text()) | {"stages": stages}
    result |= json.loads(measured.read_text()) if measured.exists() else {}
    (folder / "gpu.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

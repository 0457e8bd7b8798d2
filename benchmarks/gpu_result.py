"""One JSON file of the stages of gpu.sh and of what they measured; needs nothing, so that a failed build is told too.

    python benchmarks/gpu_result.py FOLDER

FOLDER/stages has a line for each stage: name, exit status, seconds. Written to FOLDER/gpu.json, with the tails of the
logs beside them, and measured.json where it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    stages = {}
    for line in (folder / "stages").read_text().splitlines():
        name, status, seconds = line.split("\t")
        log = (folder / f"{name}.log").read_text(errors="replace").splitlines()
        stages[name] = {"exit_status": int(status), "seconds": int(seconds), "log": log[-12:]}
    measured = folder / "measured.json"
    result = {"stages": stages} | (json.loads(measured.read_text()) if measured.exists() else {})
    (folder / "gpu.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

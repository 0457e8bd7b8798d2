"""How every benchmark measures: in turn, medians, the same allocator for all, and the machine's facts beside them."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, commit, processor

from dpt_hpc import _C, __version__

RESULTS = ROOT / "benchmarks" / "results"
"""What is committed: measured on purpose, with --out."""
OUTPUT = ROOT / "build" / "bench"

KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "268435456"}
"""glibc keeps freed memory: page faults of large temporaries cost whoever makes them 1.3 to 2.7 times the work."""

PACKAGES = (
    "torch",
    "numpy",
    "torch-scatter",
    "torch-cluster",
    "pymatgen-core",
    "matscipy",
    "vesin",
    "nvalchemi-toolkit-ops",
    "warp-lang",
)


def keep_heap() -> None:
    """Starts this program again with KEPT_HEAP, if it was started without: glibc reads it once."""
    if any(os.environ.get(name) != value for name, value in KEPT_HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT_HEAP})


def facts() -> dict[str, Any]:
    """Date, machine and versions: what a number is worth nothing without."""
    found = {"dpt-hpc": _version("dpt-hpc") or __version__}
    found |= {name: v for name in PACKAGES if (v := _version(name))}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", Path(sys.argv[0]).name, *(Path(a).name for a in sys.argv[1:])]),
        "machine": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": _C.level,
        "python": platform.python_version(),
        "versions": found,
        "allocator": {name: os.environ[name] for name in KEPT_HEAP if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clock(threads: int) -> Callable[[], float]:
    """Seconds of this process's own work, which a busy machine does not stretch; of wall time with several threads."""
    return time.process_time if threads == 1 else time.perf_counter


def in_turn(runs: Mapping[str, Callable[[], Any]], repeats: int, now: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each; every round runs all of them, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = now()
            run()
            seconds[name].append(now() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident(field: str) -> int:
    """Bytes of resident memory (VmRSS) or their peak (VmHWM), from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> int:
    """Makes VmHWM start anew; the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def write(path: Path, result: Mapping[str, Any]) -> None:
    """JSON, at once complete: a run that is cut off leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)

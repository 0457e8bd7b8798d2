"""The CUDA kernels as host C++: the module that tests/emulation makes of them, and second runs of test files in a
process that a sanitizer watches."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
SANITIZER = "DPT_HPC_EMULATED_WITH_SANITIZER"
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=undefined,address", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"]
OWN = [f"-I{path}" for path in (ROOT / "csrc", EMULATION)]


def build(sanitizer: str) -> Path:
    """The emulated module, compiled once per state of its sources; an object per .cu file, so that a change of one
    compiles one."""
    headers = [*sorted((ROOT / "csrc").glob("*.h")), *sorted(EMULATION.glob("*.h"))]
    sources = [*sorted((ROOT / "csrc").glob("*.cu")), EMULATION / "module.cpp"]
    system = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    shared = hashlib.sha256(b"".join(h.read_bytes() for h in headers) + sanitizer.encode())

    def compiled(source: Path) -> Path:
        digest = shared.copy()
        digest.update(source.read_bytes())
        out = folder / f"{source.stem}.{digest.hexdigest()[:16]}.o"
        kernels = ["-O1", "-ffp-contract=off", *SANITIZERS[sanitizer]]
        flags = ["-O0", *system] if source.suffix == ".cpp" else kernels
        _make(out, [COMPILER, *FLAGS, *OWN, *flags, "-x", "c++", "-c", str(source)])
        return out

    with _alone(folder), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
        name = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
        out = folder / name / "emulated.so"
        out.parent.mkdir(exist_ok=True)
        _make(out, [COMPILER, *SANITIZERS[sanitizer], "-shared", *map(str, objects)])
    return out


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Other test processes wait, and then find what this one has compiled."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(out: Path, command: list[str]) -> None:
    if not out.exists():
        partial = out.with_name(f"{out.name}.{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(out)


def load() -> ModuleType:
    path = build(os.environ.get(SANITIZER, ""))
    spec = importlib.util.spec_from_file_location("emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def watched(sanitizer: str) -> dict[str, str]:
    """The variables of a process that a sanitizer watches."""
    library = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    # A sanitizer looks for the exceptions of C++ when it is loaded, and the interpreter brings none.
    queries = [[COMPILER, f"-print-file-name={name}"] for name in (library, "libstdc++.so.6")]
    libraries = [subprocess.run(q, check=True, capture_output=True, text=True).stdout.strip() for q in queries]
    return {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }


def run_again(sanitizer: str, test_files: Iterable[Path], *options: str) -> None:
    """The tests of some files once more, in a process that a sanitizer watches: address (and undefined behaviour), or
    thread, where each thread of a kernel is one of the machine."""
    environment = os.environ | {SANITIZER: sanitizer} | watched(sanitizer)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, *map(str, test_files)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

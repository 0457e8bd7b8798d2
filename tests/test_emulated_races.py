"""No two threads of a block touch one place in shared memory without a barrier: the thread sanitizer watches the CUDA
kernels, each thread of CUDA being one of the operating system (tests/emulation/threads.h)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import COMPILER, EMULATION, FLAGS, ROOT

THREADS = EMULATION / "threads"
PROGRAMS = sorted(path.stem for path in THREADS.glob("*.cpp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_races(name: str, tmp_path: Path) -> None:
    program = tmp_path / name
    own = [f"-I{path}" for path in (ROOT / "csrc", EMULATION, THREADS)]
    command = [COMPILER, *FLAGS, *own, "-O1", "-fsanitize=thread", str(THREADS / f"{name}.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    racy, clean = (
        subprocess.run([program, *arguments], capture_output=True, text=True) for arguments in (["race"], [])
    )
    if "unexpected memory mapping" in racy.stderr:
        pytest.skip("the thread sanitizer of this compiler does not start under this kernel's address randomisation")
    assert "data race" in racy.stderr
    assert clean.returncode == 0, clean.stderr

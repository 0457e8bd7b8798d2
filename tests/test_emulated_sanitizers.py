"""The CUDA kernels touch no address that is not theirs, and no two threads of a block touch one place in shared memory
without a barrier: sanitizers watch them as host C++."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import COMPILER, EMULATION, FLAGS, ROOT, run_again

THREADS = EMULATION / "threads"
PROGRAMS = sorted(path.stem for path in THREADS.glob("*.cpp"))
TESTS = sorted(set(Path(__file__).parent.glob("test_emulated_*.py")) - {Path(__file__)})


@pytest.mark.slow
def test_no_address_is_wrong() -> None:
    run_again("address", TESTS)


@pytest.mark.slow
def test_no_threads_race_over_the_graph() -> None:
    run_again("thread", [Path(__file__).with_name("test_emulated_cuda.py")], "-k", "every_kernel_on_few_atoms")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_threads_race_over_messages(name: str, tmp_path: Path) -> None:
    """Each thread of CUDA is one of the operating system (tests/emulation/threads.h)."""
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

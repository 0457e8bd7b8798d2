"""The examples run as they are, in an empty folder, and the CSV example with a table of its user's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import bulk
from ase.io import write
from required import needs_mpi

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def ran(folder: Path, name: str, *arguments: str) -> str:
    """What an example prints."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {**os.environ, **root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_crystal_is_relaxed(tmp_path: Path) -> None:
    assert "wrote relaxed.cif" in ran(tmp_path, "relax_a_crystal")
    write(tmp_path / "copper.cif", bulk("Cu", cubic=True))
    said = ran(tmp_path, "relax_a_crystal", "runs/smooth", "copper.cif")
    assert "pre-trained" not in said
    assert "trained on: mlearn" in said


@pytest.mark.slow
def test_a_network_is_fine_tuned_on_a_table_of_cif_files(tmp_path: Path) -> None:
    said = ran(tmp_path, "finetune_on_your_own")
    assert "bulk_modulus: test MAE" in said
    assert len((tmp_path / "predicted.csv").read_text().splitlines()) == 81


@needs_mpi
@pytest.mark.slow
def test_two_ranks_train_and_slurm_commands_are_shown(tmp_path: Path) -> None:
    said = ran(tmp_path, "scale_out_on_slurm")
    assert "2 ranks, DeepSpeedEngine" in said
    assert "launch/slurm.sbatch CONFIG" in said or "job_files/slurm.sbatch CONFIG" in said
